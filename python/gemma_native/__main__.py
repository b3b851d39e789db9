"""`python -m gemma_native` is the command `gemma-native`."""

from __future__ import annotations

import sys

from gemma_native.cli import main

if __name__ == "__main__":
    sys.exit(main())

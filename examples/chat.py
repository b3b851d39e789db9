"""A streaming chat in a terminal. Needs instruction-tuned weights, such as a GGUF file of Gemma 3 1B `-it`.

Usage: python examples/chat.py gemma-3-1b-it-Q4_K_M.gguf
"""

from __future__ import annotations

import sys

from gemma_native import Gemma

if len(sys.argv) != 2:
    sys.exit(__doc__)
with Gemma.load(sys.argv[1]) as gemma:
    chat = gemma.chat(system="Answer in one short paragraph.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            break
        if question:
            for piece in chat.stream(question, max_tokens=512):  # the conversation so far is not computed again
                print(piece, end="", flush=True)
            print()

"""The errors that gemma_native raises beside Python's own."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what it should be; the message names the file and the field."""


class MissingDependency(ImportError):
    """An optional package is needed for this call; the message says how to install it."""

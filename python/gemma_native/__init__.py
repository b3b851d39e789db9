"""Google's Gemma models inside a Python process. Start with `Gemma.load("demo")`; see the README."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._native import Cancelled, Model
    from .errors import FormatError, MissingDependency
    from .gemma import Gemma
    from .sampling import SamplingParams

__all__ = ["Cancelled", "FormatError", "Gemma", "MissingDependency", "Model", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "Cancelled": "._native",
    "FormatError": ".errors",
    "Gemma": ".gemma",
    "MissingDependency": ".errors",
    "Model": "._native",
    "SamplingParams": ".sampling",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line is up, and can tell an error in one line, before the engine is.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value

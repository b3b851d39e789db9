"""Google's Gemma models inside a Python process. Start with `Gemma.load("demo")`; see the README."""

from __future__ import annotations

from ._native import Model
from .gemma import Gemma
from .sampling import SamplingParams

__all__ = ["Gemma", "Model", "SamplingParams"]
__version__ = "0.1.0"

"""Ranks sentences by how likely the model finds them: log-probabilities without generating anything.

Usage: python examples/rank.py [MODEL]
"""

from __future__ import annotations

import sys

from gemma_native import Gemma

SENTENCES = [
    "The cat sat on the mat.",
    "The cat sat on the moon.",
    "Mat the on sat cat the.",
    "La casa es muy grande.",
]

with Gemma.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as gemma:
    scores = [(gemma.score(sentence), sentence) for sentence in SENTENCES]
    for score, sentence in sorted(scores, key=lambda pair: pair[0].perplexity):
        worst = min(score.logprobs)
        print(f"perplexity {score.perplexity:9.2f}   least likely token {worst:7.2f}   {sentence}")

"""Writes what the tests compare with: `golden/*.npz`. Run by hand when tiny.py, the texts or the specification change.

    python tests/make_golden.py tiny    logits of Hugging Face transformers in float32 for tiny seeded checkpoints
                                        (needs torch, transformers >= 5)
    python tests/make_golden.py demo    log-probabilities of the real Gemma 3 270M under reference.py, for the texts in
                                        data/ (needs gemma_native with the `demo` extra, 3 GiB of memory, a minute)

The tests themselves need neither torch nor transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import reference
import tiny

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).parent / "data"
SEED = 2026
PROMPT = 56  # tokens; longer than every window in tiny.CASES
CONTINUED = 12  # greedy tokens after it
SLICE = 64  # rows of 262,144 logits at a time


def prompt(case: str) -> np.ndarray:
    """The prompt of a tiny case: <bos> and random tokens."""
    raw = np.random.PCG64(list(tiny.CASES).index(case)).random_raw(PROMPT)
    tokens = (raw % np.uint64(tiny.hf_config(tiny.CASES[case])["vocab_size"])).astype(np.int32)
    tokens[0] = 2
    return tokens


def make_tiny() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    for case in tiny.CASES:
        tokens = prompt(case)
        logits = []
        for dialect in (4, 5):
            with tempfile.TemporaryDirectory() as folder:
                tiny.write_hf(Path(folder), case, SEED, dialect=dialect)
                # "eager" is the only attention of transformers that knows soft caps everywhere.
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            ids = torch.tensor(tokens.astype(np.int64))[None]
            with torch.no_grad():
                logits.append(model(ids).logits[0].numpy())
                for _ in range(CONTINUED):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if not np.array_equal(*logits):
            raise SystemExit(f"{case}: the two dialects of config.json differ by {reference.nse(*logits):.1e}")
        greedy = ids[0, PROMPT:].numpy().astype(np.int32)
        np.savez_compressed(GOLDEN / f"{case}.npz", tokens=tokens, logits=logits[0], greedy=greedy)
        print(case, logits[0].shape, f"std {logits[0].std():.2f}", greedy.tolist(), flush=True)


def make_demo() -> None:
    from gemma_native.weights import open_checkpoint

    checkpoint = open_checkpoint("demo")
    config, weights = checkpoint.config, reference.weights_of(checkpoint.tensors)
    assert checkpoint.tokenizer is not None
    tokenizer = checkpoint.tokenizer()
    results = {}

    def logits_of(tokens: list[int], first: int = 0) -> np.ndarray:
        hidden = reference.hidden_states(config, weights, tokens)
        return np.concatenate(
            [reference.head(config, weights, hidden[i : i + SLICE]) for i in range(first, len(tokens), SLICE)]
        )

    tokens = list(tokenizer.encode("The capital of France is"))
    start = len(tokens)
    margins = []
    for _ in range(CONTINUED):
        last = logits_of(tokens, len(tokens) - 1)[-1]
        best = np.partition(last, -2)[-2:]
        margins.append(best[1] - best[0])
        tokens.append(int(last.argmax()))
    print(repr(tokenizer.decode(tokens[start:])), np.round(margins, 2))
    results |= {"greedy_tokens": np.array(tokens, np.int32), "greedy_margins": np.array(margins, np.float32)}

    for path in sorted(DATA.glob("*.txt")):
        tokens = list(tokenizer.encode(path.read_text(encoding="utf-8")))
        hidden = reference.hidden_states(config, weights, tokens)
        logprobs, best, margin = [], [], []
        for i in range(0, len(tokens) - 1, SLICE):
            target = tokens[i + 1 : i + SLICE + 1]
            logits = reference.head(config, weights, hidden[i : i + len(target)])
            logprobs.append(reference.log_softmax(logits)[np.arange(len(target)), target])
            best.append(logits.argmax(-1))
            top = np.partition(logits, -2)[:, -2:]
            margin.append(top[:, 1] - top[:, 0])
        p = np.concatenate(logprobs)
        results |= {
            f"{path.stem}_tokens": np.array(tokens, np.int32),
            f"{path.stem}_logprobs": p.astype(np.float32),
            f"{path.stem}_argmax": np.concatenate(best).astype(np.int32),
            f"{path.stem}_margin": np.concatenate(margin).astype(np.float32),
        }
        print(f"{path.stem}: {len(tokens)} tokens, perplexity {np.exp(-p.mean()):.4f}", flush=True)
    np.savez_compressed(GOLDEN / "demo.npz", **results)


if __name__ == "__main__":
    if sys.argv[1:] not in (["tiny"], ["demo"]):
        raise SystemExit(__doc__)
    GOLDEN.mkdir(exist_ok=True)
    make_tiny() if sys.argv[1] == "tiny" else make_demo()

"""What a checkpoint and this machine are (`gemma-native info`), and how fast they are together (`gemma-native bench`).

`describe` opens a checkpoint's tables without reading its weights. `bench` times whole calls of the native model
between probes of the machine's own ceilings.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import _native
from .config import Config
from .gguf import TYPES
from .weights import EMBEDDING, open_checkpoint

BLOCKS = {name: (values, size) for name, values, size in TYPES.values()}  # encoding -> values and bytes of a block
TARGETS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


# Sizes


def kept_as(name: str, encoding: str, shape: tuple[int, ...], weights: str) -> str:
    """The encoding in memory of a tensor that a file holds as `encoding`."""
    if len(shape) == 1:
        return "F32"
    if encoding.startswith("TILED:"):
        return encoding.removeprefix("TILED:")
    if weights == "auto":
        return "BF16" if encoding in ("F32", "F16") else encoding
    return "Q8_0" if weights == "int4" and name == EMBEDDING else TARGETS[weights]


def bytes_as(encoding: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in memory; quantised rows come in panels of 32."""
    values, size = BLOCKS[encoding]
    *rows, cols = shape
    n = rows[0] if rows else 1
    if values > 1:
        n = -(-n // 32) * 32
    return n * -(-cols // values) * size


def kv_bytes(config: Config, length: int, kv: str, *, rings: bool) -> int:
    """Bytes of keys and values for `length` positions: what a cache commits (`rings`), or what one step reads."""
    row = 2 * config.num_kv_heads * config.head_dim * (4 if kv == "f32" else 2)
    total = 0
    for layer in range(config.num_layers):
        held = length
        if config.sliding_window and config.sliding_layers and config.sliding_layers[layer]:
            window = config.sliding_window
            ring = -(-(window + _native.MAX_ROWS) // _native.KEY_BLOCK) * _native.KEY_BLOCK
            held = min(length, ring if rings else window)
        total += row * held
    return total


def operations(config: Config, n: int) -> float:
    """Multiplications and additions of a prompt of n tokens: every layer for all of them, the head for the last."""
    c = config
    inner = c.num_heads * c.head_dim
    layer = c.hidden_size * (2 * inner + 2 * c.num_kv_heads * c.head_dim + 3 * c.intermediate_size)
    total = 2.0 * c.num_layers * layer * n + 2.0 * c.vocab_size * c.hidden_size
    for i in range(c.num_layers):
        window = n
        if c.sliding_window and c.sliding_layers and c.sliding_layers[i]:
            window = min(n, c.sliding_window)
        pairs = window * (window + 1) / 2 + (n - window) * window  # (query, key) pairs that the mask leaves
        total += 4.0 * inner * pairs
    return total


# info


def describe(source: str, *, device: str, weights: str, kv: str, threads: int | None) -> dict[str, Any]:
    """Facts about a checkpoint and what would run it here, ready for JSON. Sizes are bytes. Weights are not read."""
    checkpoint = open_checkpoint(source)
    try:
        config = checkpoint.config
        tensors = [
            {"name": name, "encoding": encoding, "shape": list(shape), "bytes": len(data)}
            for name, (encoding, shape, data) in checkpoint.tensors.items()
        ]
        memory = sum(
            bytes_as(kept_as(name, encoding, shape, weights), shape)
            for name, (encoding, shape, _) in checkpoint.tensors.items()
        )
        parameters = sum(math.prod(shape) for _, shape, _ in checkpoint.tensors.values())
        facts: dict[str, Any] = {
            "source": str(checkpoint.source),
            "config": dataclasses.asdict(config),
            "parameters": parameters,
            "tensors": tensors,
            "tokenizer": checkpoint.tokenizer is not None,
            "chat_template": checkpoint.chat_template is not None,
        }
    finally:
        checkpoint.close()

    cuda = _native.cuda_status()
    if device == "auto":
        device = "cpu" if cuda else "cuda"
    elif device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f'device {device!r} is none of "auto", "cpu", "cuda", "cuda:N"')
    facts["memory"] = {
        "weights": memory,
        "kv": kv,
        "kv_per_token": kv_bytes(config, 1, kv, rings=True),
        "kv_full_context": kv_bytes(config, config.context_length, kv, rings=True),
    }
    facts["machine"] = {
        "device": device,
        "cuda": cuda or "usable",
        "isa": _native.isa(),
        "bf16_instructions": _native.bf16_instructions(),
        "isa_levels": _native.isa_levels(),
        "threads": threads or _native.default_threads(),
    }
    return facts


def size_text(n: float) -> str:
    """Bytes as people write them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:,.0f} {unit}" if unit == "bytes" or n >= 100 else f"{n:,.2f} {unit}"
        n /= 1000
    raise AssertionError


def describe_text(facts: dict[str, Any], *, every_tensor: bool = False) -> str:
    """`describe` for people."""
    c, memory, machine = facts["config"], facts["memory"], facts["machine"]
    groups: dict[str, list[int]] = {}
    for tensor in facts["tensors"]:
        groups.setdefault(tensor["encoding"], []).append(tensor["bytes"])
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1]))
    sliding = sum(c["sliding_layers"])
    window = f"; {sliding} of them see {c['sliding_window']} tokens back" if sliding and c["sliding_window"] else ""
    extras = [
        text
        for text, there in [
            (f"attention soft cap {c['attn_softcap']:g}", c["attn_softcap"]),
            (f"logit soft cap {c['final_softcap']:g}", c["final_softcap"]),
            ("QK-norm", c["qk_norm"]),
            ("post-norms", c["post_norms"]),
        ]
        if there
    ]
    rope = f"{c['rope_base']:g}" + (f" (local {c['rope_base_local']:g})" if sliding else "")
    if c["rope_scale"] != 1:
        rope += f", positions / {c['rope_scale']:g}"
    rows = [
        ("file", facts["source"]),
        ("model", f"{c['architecture']}, {facts['parameters']:,} parameters"),
        ("layers", f"{c['num_layers']}{window}"),
        (
            "sizes",
            f"hidden {c['hidden_size']}, {c['num_heads']} heads and {c['num_kv_heads']} key/value heads of "
            f"{c['head_dim']}, FFN {c['intermediate_size']}, vocabulary {c['vocab_size']}",
        ),
        ("context", f"{c['context_length']:,} tokens; RoPE base {rope}"),
        ("extras", ", ".join(extras) or "none"),
        ("stops on", ", ".join(str(token) for token in c["eos_token_ids"])),
        (
            "text",
            ("a tokenizer" if facts["tokenizer"] else "no tokenizer: token ids only")
            + (", a chat template" if facts["chat_template"] else ", no chat template"),
        ),
        (
            "tensors",
            f"{len(facts['tensors'])}: "
            + ", ".join(f"{len(sizes)} {name} ({size_text(sum(sizes))})" for name, sizes in ordered),
        ),
        ("weights", f"{size_text(memory['weights'])} in memory"),
        (
            "KV cache",
            f"{memory['kv_per_token']:,} bytes a token ({memory['kv']}), "
            f"{size_text(memory['kv_full_context'])} for the whole context",
        ),
        (
            "here",
            f"device {machine['device']}, {machine['threads']} threads, instructions {machine['isa']} "
            f"(of {', '.join(machine['isa_levels'])})",
        ),
        ("CUDA", machine["cuda"]),
    ]
    lines = [f"{label:<9} {text}" for label, text in rows]
    if every_tensor:
        lines.append("")
        width = max(len(tensor["name"]) for tensor in facts["tensors"])
        for tensor in facts["tensors"]:
            shape = " x ".join(str(n) for n in tensor["shape"])
            size = size_text(tensor["bytes"])
            lines.append(f"{tensor['name']:<{width}}  {tensor['encoding']:<10} {shape:>16}  {size}")
    return "\n".join(lines)


# bench


def bench(
    model: _native.Model,
    *,
    prompts: Sequence[int] = (512,),
    contexts: Sequence[int] = (128,),
    batches: Sequence[int] = (1,),
    tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Times prefill and greedy decode in interleaved rounds, with the ceilings probed in each; medians and spreads.

    prompts: sizes of prefill, each from an empty cache. contexts x batches: `tokens` steps from so many positions with
    so many sequences. Rates: tokens/s over all sequences, bytes/s of weights and KV that a step uses, operations/s.
    """
    config = model.config
    limit = config.context_length
    for n in prompts:
        if n > limit:
            raise ValueError(f"a prompt of {n} tokens does not fit the context of {limit}")
    for n in contexts:
        if n + tokens > limit:
            raise ValueError(f"{tokens} tokens after {n} do not fit the context of {limit}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    if tokens > _native.MAX_ROWS:
        raise ValueError(f"at most {_native.MAX_ROWS} tokens a round, so that caches can be rewound; got {tokens}")
    encodings = model.encodings()
    quantised = BLOCKS[encodings["model.layers.0.mlp.gate_proj.weight"]][0] > 1  # two thirds of a layer's work

    def text(n: int, salt: int = 0) -> list[int]:
        # Any ids will do: the work does not depend on them. Low ids exist in every model.
        return [(7919 * (i + 31 * salt) + 13) % min(config.vocab_size, 50_000) for i in range(n)]

    prefill_cache = model.new_cache(max(prompts))
    model.forward(text(min(32, *prompts)), prefill_cache, top_k=1)  # warms threads, scratch and pages
    decode_caches = []
    for context in contexts:
        progress(f"filling a context of {context}")
        first = model.new_cache(context + tokens)
        model.forward(text(context), first, top_k=1)
        decode_caches.append([first] + [first.clone() for _ in range(max(batches) - 1)])

    times: dict[tuple[str, int, int], list[float]] = {}
    bandwidths: list[float] = []
    peaks: list[dict[str, float]] = []
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        read, products = _ceilings(model)
        bandwidths.append(read)
        peaks.append(products)
        for n in prompts:
            prefill_cache.truncate(0)
            ids = text(n)
            started = time.perf_counter()
            model.forward(ids, prefill_cache, top_k=1)
            times.setdefault(("prefill", n, 1), []).append(time.perf_counter() - started)
        for context, caches in zip(contexts, decode_caches, strict=True):
            for batch in batches:
                started = time.perf_counter()
                _decode(model, caches[:batch], tokens)
                times.setdefault(("decode", context, batch), []).append(time.perf_counter() - started)
                for cache in caches[:batch]:
                    cache.truncate(context)

    bandwidth = statistics.median(bandwidths)
    peak_of = {name: statistics.median([p[name] for p in peaks]) for name in peaks[0]}
    # Tensor cores multiply bf16; a CPU without bf16 instructions probes what stands in for them.
    kind = "int8" if model.device == "cpu" and quantised else "bf16"
    peak = peak_of.get(kind)
    results = []
    for (what, n, batch), seconds in times.items():
        produced = n if what == "prefill" else tokens * batch
        rates = sorted(produced / s for s in seconds)
        entry: dict[str, Any] = {
            "what": what,
            "tokens": n,
            "batch": batch,
            "tokens_per_s": statistics.median(rates),
            "slowest": rates[0],
            "fastest": rates[-1],
        }
        if what == "prefill":
            rate = operations(config, n) * entry["tokens_per_s"] / n
            entry |= {"ops_per_s": rate, "of_peak": rate / peak if peak else None}
        else:
            moved = model.nbytes + batch * kv_bytes(config, n + tokens // 2, model.kv, rings=False)
            rate = moved * entry["tokens_per_s"] / batch
            entry |= {"bytes_per_s": rate, "of_bandwidth": rate / bandwidth}
        results.append(entry)
    return {
        "device": model.device,
        "isa": model.isa,
        "threads": model.threads,
        "weight_bytes": model.nbytes,
        "encodings": sorted(set(encodings.values())),
        "kv": model.kv,
        "rounds": rounds,
        "read_bandwidth": bandwidth,
        "peak": peak_of,
        "peak_used": kind if peak else None,
        "results": results,
    }


def _ceilings(model: _native.Model) -> tuple[float, dict[str, float]]:
    """Bytes/s of a read, and operations/s by what is multiplied, of the model's device."""
    ceilings = model.ceilings()
    if ceilings is None:
        return _native.measure_read_bandwidth(model.threads), _native.measure_peak(model.threads)
    return ceilings["read_bandwidth"], {"bf16": ceilings["bf16"]}


def _decode(model: _native.Model, caches: list[_native.Cache], tokens: int) -> None:
    """As many greedy steps of each sequence."""
    steps = [[5 + i] for i in range(len(caches))]
    for _ in range(tokens):
        if len(caches) == 1:
            ids, _ = model.forward(steps[0], caches[0], top_k=1)
            steps = [[int(ids[0])]]
        else:
            ids, _ = model.forward_batch(steps, caches, top_k=1)
            steps = [[int(row[0])] for row in ids]


def bench_text(facts: dict[str, Any]) -> str:
    """`bench` for people."""
    lines = [
        f"{facts['model']}: {size_text(facts['weight_bytes'])} of weights ({', '.join(facts['encodings'])}), "
        f"KV {facts['kv']}; {facts['device']}, {facts['isa']}, {facts['threads']} threads; "
        f"medians of {facts['rounds']} rounds"
    ]
    peaks = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in facts["peak"].items())
    lines.append(f"ceilings: {facts['read_bandwidth'] / 1e9:.1f} GB/s read; peak Gop/s {peaks}")
    lines.append(f"{'':<26}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}   rate")
    for r in facts["results"]:
        label = f"{r['what']} {'of' if r['what'] == 'prefill' else 'at'} {r['tokens']}"
        if r["batch"] > 1:
            label += f", batch {r['batch']}"
        if r["what"] == "prefill":
            rate, share, ceiling = f"{r['ops_per_s'] / 1e9:,.0f} Gop/s", r["of_peak"], f"the {facts['peak_used']} peak"
        else:
            rate, share, ceiling = f"{r['bytes_per_s'] / 1e9:.1f} GB/s", r["of_bandwidth"], "the read bandwidth"
        if share is not None:
            rate += f", {100 * share:.0f} % of {ceiling}"
        lines.append(f"{label:<26}{r['tokens_per_s']:>10.1f}{r['slowest']:>10.1f}{r['fastest']:>10.1f}   {rate}")
    return "\n".join(lines)

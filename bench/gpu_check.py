"""Everything about the CUDA backend that only a GPU can tell, in one command and within about eight minutes.

    python bench/gpu_check.py > gpu.md

Builds the package with nvcc into a temporary directory, compares the GPU with the CPU engine, runs the CUDA tests,
compute-sanitizer, a hundred greedy runs, and measures 2B- and 7B-shaped models beside the GPU's own ceilings. Prints Markdown for
docs/SPEED.md. Needs nvcc, CMake, pybind11, scikit-build-core and NumPy, and no network; pytest, compute-sanitizer, PyTorch and
transformers are used where they are. Exit code 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()
failures: list[str] = []


def say(text: str = "") -> None:
    print(text, flush=True)


def verdict(what: str, ok: bool, detail: str) -> None:
    say(f"- {what}: {'ok' if ok else '**FAILED**'} ({detail}; {time.monotonic() - STARTED:.0f} s)")
    if not ok:
        failures.append(what)


def left(args: argparse.Namespace) -> float:
    return float(args.minutes * 60 - (time.monotonic() - STARTED))


# --- models of random weights, in memory ---


def model(shape: checkpoints.Shape, mix: str, device: str, **options: Any) -> Any:
    """A Gemma 1 of this shape; every tensor of a kind is cut from one pool, so the host's memory stays small."""
    from gemma_native import _native
    from gemma_native.config import Config
    from gemma_native.measure import BLOCKS

    config = Config(
        "gemma", shape.vocab, shape.hidden, shape.ffn, shape.layers, shape.heads, shape.kv_heads, shape.head_dim,
        shape.context, shape.head_dim**-0.5, norm_offset=0.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pools: dict[str, np.ndarray[Any, Any]] = {}
    tensors: dict[str, tuple[str, tuple[int, ...], memoryview]] = {}
    for name, dims in checkpoints.tensors(shape):
        kind = checkpoints.encoding(name, mix, shape.layers)
        name = checkpoints.hf_name(name)
        if kind == "F32":
            data: np.ndarray[Any, Any] = np.ones(dims, np.float32)
        else:
            values, size = BLOCKS[kind]
            blocks = int(np.prod(dims)) // values
            if len(pools.get(kind, ())) < blocks:
                pool = checkpoints.random_blocks(kind, rng)
                pools[kind] = np.ascontiguousarray(np.tile(pool, (-(-blocks // len(pool)), 1)))
            start = int(rng.integers(max(1, min(1 << 16, len(pools[kind]) - blocks))))
            data = pools[kind][start : start + blocks]
            assert data.nbytes == blocks * size
        tensors[name] = (kind, dims, memoryview(data).cast("B"))
    return _native.Model(config, tensors, device, **options)


# --- parts ---


def build(args: argparse.Namespace, target: Path) -> bool:
    begin = time.monotonic()
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(target / "site"),
        "--config-settings", f"build-dir={target / 'build'}", "-C", "cmake.define.GEMMA_NATIVE_CUDA=ON",
        "--config-settings", "cmake.define.CMAKE_CUDA_ARCHITECTURES=native", str(ROOT),
    ]  # fmt: skip
    r = subprocess.run(command, capture_output=True, text=True)
    verdict("build with nvcc", r.returncode == 0, f"{time.monotonic() - begin:.0f} s")
    if r.returncode:
        say("```\n" + (r.stdout + r.stderr)[-3000:] + "\n```")
    return r.returncode == 0


def find_cublas() -> None:
    """The wheel that this Python has, if any; the module alone looks beside itself and in the system."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in [*Path(place).glob("cu*/lib/libcublasLt.so.*"), *Path(place).glob("cublas/lib/libcublasLt.so.*")]:
            os.environ.setdefault("GEMMA_NATIVE_CUBLAS", str(path))


def parity(device: str) -> None:
    """The GPU's logits beside the CPU engine's, prefill and decode, for every mix of encodings."""
    small = checkpoints.Shape(2, 512, 4, 1, 256, 1024, 3000, 1024)
    many = checkpoints.Shape(2, 512, 4, 4, 128, 1024, 3000, 1024)
    tokens = [(7919 * i + 13) % 3000 for i in range(150)]
    worst, name = 0.0, ""
    for shape in (small, many):
        for mix in ("BF16", "Q8_0", "Q4_0", "Q4_K_M"):
            results = []
            for where in ("cpu", device):
                m = model(shape, mix, where, kv="f32")
                cache = m.new_cache()
                rows = [m.forward(tokens, cache, all_logits=True)]
                rows += [m.forward([t], cache)[None] for t in (5, 7, 11)]
                results.append(np.concatenate(rows))
            a, b = results
            error = float(np.square(a - b).sum() / np.square(a - a.mean()).sum())
            if not error <= worst:
                worst, name = error, f"{mix}, {shape.kv_heads} KV heads"
    # The CPU rounds activations to 8 bits for quantised weights, the GPU's prefill to bf16.
    verdict("logits beside the CPU engine", worst <= 2e-3, f"largest normalised squared error {worst:.1e}, {name}")


def tests(env: dict[str, str]) -> None:
    if not importlib.util.find_spec("pytest"):
        say("- the CUDA tests: not run, there is no pytest")
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_cuda.py",
        "tests/test_cuda_failures.py",
        "-k",
        "not emulated",
    ]
    r = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = r.stdout.strip().splitlines() or ["no output"]
    if r.returncode in (0, 1):
        verdict("the CUDA tests", r.returncode == 0, lines[-1])
    else:
        say(f"- the CUDA tests: not run ({(r.stderr.strip().splitlines() or lines)[-1]})")
    if r.returncode:
        say("```\n" + "\n".join(lines[-25:]) + "\n```")


def sanitize(env: dict[str, str], device: str) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool:
        say("- compute-sanitizer: not found")
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--sanitized", device]
        # Without cuBLASLt, whose own kernels racecheck takes for racing.
        without = {"GEMMA_NATIVE_CUBLAS": "off"} if check == "racecheck" else {}
        r = subprocess.run(command, env={**env, **without}, capture_output=True, text=True, timeout=240)
        text = r.stdout + r.stderr
        if "Device not supported" in text:
            say(f"- {check}: this device is not supported by compute-sanitizer")
            continue
        verdict(check, r.returncode == 0 and "ran to the end" in text, (text.strip().splitlines() or ["nothing"])[-1])
        if r.returncode:
            say("```\n" + text[-3000:] + "\n```")


def sanitized(device: str) -> None:
    shape = checkpoints.Shape(1, 256, 4, 2, 128, 2304, 1000, 256)
    for mix in ("BF16", "Q4_K_M"):
        m = model(shape, mix, device)
        caches = [m.new_cache() for _ in range(40)]
        m.forward(list(range(80)), caches[0])
        for t in (5, 7, 9):
            m.forward([t], caches[0], top_k=3)
        for n in (3, 12, 40):  # matvec, many of 16 and of more rows
            for _ in range(2):
                m.forward_batch([[7]] * n, caches[:n], top_k=2)
        m.score(list(range(20)), m.new_cache())
    print("ran to the end")


def greedy(m: Any, steps: int) -> list[int]:
    cache = m.new_cache(64 + steps)
    ids, _ = m.forward([(31 * i + 2) % 1000 for i in range(40)], cache, top_k=1)
    out = [int(ids[0])]
    while len(out) < steps:
        ids, values = m.forward(out[-1:], cache, top_k=2)
        out.append(int(ids[0]))
    return [*out, *values.view(np.int32).tolist()]


def repeat(device: str, runs: int) -> None:
    shape = checkpoints.Shape(4, 1024, 4, 1, 256, 4096, 32000, 1024)
    outcomes = set()
    for mix in ("BF16", "Q4_0"):
        m = model(shape, mix, device)
        outcomes |= {(mix, *greedy(m, 24)) for _ in range(runs)}
    verdict(
        f"{runs} greedy runs of 24 tokens, bf16 and Q4_0", len(outcomes) == 2, f"{len(outcomes) - 1} outcome(s) each"
    )


def measure(args: argparse.Namespace, device: str) -> None:
    from gemma_native.measure import bench

    say("\n| model | weights | what | tokens/s | of the ceiling |\n|---|---|---|---|---|")
    ceilings = None
    for name in args.shapes:
        shape = checkpoints.SHAPES[name]
        for mix in ("BF16", "Q8_0", "Q4_0"):
            if left(args) < 60:
                say(f"| {name} | {mix} | not measured: {args.minutes} minutes are over | | |")
                continue
            m = model(shape, mix, device)
            long = [n for n in (32, 4096, 8064) if n + 32 <= shape.context]
            facts = bench(
                m, prompts=[n for n in (32, 512, 2048) if n <= shape.context],
                contexts=long if mix == "BF16" else long[:1], batches=[1], tokens=32, rounds=3,
            )  # fmt: skip
            batches = bench(m, prompts=[32], contexts=[32], batches=[8, 32], tokens=16, rounds=3)
            ceilings = ceilings or (facts["read_bandwidth"], facts["peak"]["bf16"], m.ceilings(256, 4096)["product"])
            rows = facts["results"] + [r for r in batches["results"] if r["what"] == "decode"]
            for r in rows:
                share = r.get("of_peak") if r["what"] == "prefill" else r["of_bandwidth"]
                what = f"prefill of {r['tokens']}" if r["what"] == "prefill" else f"decode at {r['tokens']}"
                what += f", batch {r['batch']}" if r["batch"] > 1 else ""
                of = "bf16 rate" if r["what"] == "prefill" else "read bandwidth"
                say(f"| {name} | {mix} | {what} | {r['tokens_per_s']:,.1f} | {100 * share:.0f} % of the {of} |")
            del m
    if ceilings:
        say(
            f"\nCeilings in the same run: {ceilings[0] / 1e9:,.0f} GB/s read, {ceilings[1] / 1e12:,.0f} Top/s bf16 ({ceilings[2]})."
        )


def peer(args: argparse.Namespace) -> None:
    """transformers with PyTorch on the same GPU, bf16."""
    if left(args) < 45 or "2b" not in args.shapes:
        return
    try:
        import torch
        from transformers import GemmaConfig, GemmaForCausalLM
    except ImportError as e:
        say(f"\ntransformers with PyTorch: not measured ({e}).")
        return
    s = checkpoints.SHAPES["2b"]
    config = GemmaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
    )  # fmt: skip
    with torch.device("cuda"), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        m = GemmaForCausalLM(config).eval()
        ids = torch.randint(5, 5000, (1, 512))

        def seconds(new: int) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            m.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        seconds(2)
        one = min(seconds(1) for _ in range(3))
        many = min(seconds(33) for _ in range(2))
    say(f"\ntransformers, PyTorch {torch.__version__}, 2b BF16: prefill of 512 {512 / one:,.0f} tokens/s, "
        f"decode {32 / (many - one):.1f} tokens/s.")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, or cuda-emulated to try this script (default: cuda)"
    )
    parser.add_argument("--shapes", default="2b,7b", type=lambda s: s.split(","), help="tiny, 2b, 7b (default: 2b,7b)")
    parser.add_argument("--minutes", type=float, default=8, help="parts are left out after this (default: 8)")
    parser.add_argument("--runs", type=int, default=100, help="greedy runs (default: 100)")
    parser.add_argument("--no-build", action="store_true", help="use the package that is installed")
    parser.add_argument("--sanitized", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sanitized:
        sanitized(args.sanitized)
        return 0
    smi = shutil.which("nvidia-smi")
    if args.device != "cuda-emulated":
        found = subprocess.run([smi, "-L"], capture_output=True, text=True).stdout.strip() if smi else ""
        if not found.startswith("GPU"):
            print("gpu_check: there is no NVIDIA GPU here (nvidia-smi -L lists none); nothing was run", file=sys.stderr)
            return 1
        query = [smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        say(f"## {subprocess.run([str(q) for q in query], capture_output=True, text=True).stdout.strip()}\n")
    with tempfile.TemporaryDirectory(prefix="gemma-native-") as folder:
        env = dict(os.environ)
        if not args.no_build:
            if not build(args, Path(folder)):
                return 1
            site = str(Path(folder) / "site")
            sys.path.insert(0, site)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [site, env.get("PYTHONPATH")]))
        find_cublas()
        env.setdefault("GEMMA_NATIVE_CUBLAS", os.environ.get("GEMMA_NATIVE_CUBLAS", ""))
        from gemma_native import _native

        status = _native.cuda_status()
        if status and args.device != "cuda-emulated":
            print(f"gpu_check: {status}", file=sys.stderr)
            return 1
        parity(args.device)
        repeat(args.device, args.runs)
        if args.device != "cuda-emulated":
            tests(env)
            sanitize(env, args.device)
            peer(args)
        measure(args, args.device)
    say(
        f"\n{'FAILED: ' + ', '.join(failures) if failures else 'Everything passed'}, {time.monotonic() - STARTED:.0f} s."
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

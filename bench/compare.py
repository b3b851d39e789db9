"""gemma_native beside its peers on one machine, in one run, between probes of the machine's own ceilings.

Every engine runs in a process of its own, which is stopped (SIGSTOP) while another one is timed. Rounds interleave the
engines cell by cell; the table gives medians with the slowest and fastest round, the ratio to each peer, and what share
of the probed read bandwidth (decode) or instruction peak (prefill) was reached. Peers that are not installed are left
out and named. Output text is not compared here.

    python bench/compare.py --model demo
    python bench/compare.py --shape 2b --type Q4_0 --prefill 512,32 --decode 32,4096 --json results.json
    python bench/compare.py --model m.gguf --hf m-directory --peer-python ../peers/bin/python

Cells: prefill N (a prompt of N tokens, the last position's choice); decode N (greedy steps of the bare engine after N
tokens); generate N (the same through the engine's own Python loop, sampling included); first N (time to its first
token, in milliseconds).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints

HERE = Path(__file__).resolve().parent
NAMES = {
    "native": "gemma_native",
    "llama": "llama-cpp-python",
    "ct2": "ctranslate2",
    "hf": "transformers",
    "ov": "openvino-genai",
}
MODULES = {"llama": "llama_cpp", "ct2": "ctranslate2", "hf": "transformers", "ov": "openvino_genai"}


class Engine:
    """The parent's side of a worker."""

    def __init__(self, kind: str, python: str, source: str, args: argparse.Namespace, context: int) -> None:
        self.kind = kind
        self.name = NAMES.get(kind, kind)
        command = [python, str(HERE / "engines.py"), kind, "--source", source, "--threads", str(args.threads)]
        command += ["--context", str(context), "--weights", args.weights, "--kv", args.kv]
        environment = dict(os.environ)
        if kind in ("native", "ceilings") and args.isa:
            environment["GEMMA_NATIVE_ISA"] = args.isa
        log = None if args.verbose else subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self.about = self._read()
        self.rest()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()} (--verbose shows its output)")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{self.name}: {value['error']}")
        return value

    def rest(self) -> None:
        """Stopped, so that threads that spin while idle do not slow the others."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP)

    def call(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        os.kill(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"call": name, "args": arguments}) + "\n")
            self.process.stdin.flush()
            return self._read()
        finally:
            self.rest()

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def cells(args: argparse.Namespace) -> list[tuple[str, int]]:
    found = [("prefill", n) for n in args.prefill] + [("decode", n) for n in args.decode]
    return found + [("first", n) for n in args.generate] + [("generate", n) for n in args.generate]


def measure(engine: Engine, what: str, n: int, args: argparse.Namespace, salt: int) -> float:
    """Tokens/s of a cell; for `first` seconds."""
    if what == "prefill":
        return n / float(engine.call("prefill", n, salt))
    if what == "decode":
        return args.tokens / float(engine.call("decode", n, args.tokens))
    first = float(engine.call("generate", n, 1, salt))
    if what == "first":
        return first
    return args.tokens / (float(engine.call("generate", n, args.tokens + 1, salt + 500)) - first)


def start_engines(
    args: argparse.Namespace, sources: dict[str, str], context: int, engines: list[Engine], missing: list[str]
) -> None:
    """Those that are wanted and installed, one after another into `engines`; why others are not, into `missing`."""
    for kind in args.engines:
        python = sys.executable if kind == "native" else args.peer_python
        if sources.get(kind) is None:
            missing.append(f"{NAMES[kind]} (no {'file: --model' if kind == 'llama' else 'directory: --hf'})")
            continue
        if (
            kind in MODULES
            and subprocess.run([python, "-c", f"import {MODULES[kind]}"], capture_output=True).returncode
        ):
            missing.append(f"{NAMES[kind]} (not installed in {python})")
            continue
        note(f"loading {NAMES[kind]}")
        try:
            engines.append(Engine(kind, python, sources[kind], args, context))
        except RuntimeError as error:
            if kind == "native":
                raise
            missing.append(" ".join(str(error).split()))


Values = dict[tuple[str, int, str], list[float]]  # what `measure` gave of a cell and an engine


def time_rounds(
    args: argparse.Namespace, engines: list[Engine], ceilings: Engine, missing: list[str]
) -> tuple[Values, list[dict[str, Any]]]:
    """The values, and what the ceilings' probes gave before each cell."""
    values: Values = {}
    probes: list[dict[str, Any]] = []

    def attempt(engine: Engine, what: str, n: int, salt: int) -> float | None:
        try:
            return measure(engine, what, n, args, salt)
        except RuntimeError as error:  # a peer that cannot do this cell may do others
            if engine.kind == "native" or engine.process.poll() is not None:
                raise
            missing.append(f"{what} {n}: {error}")
            return None

    for engine in engines:  # one untimed turn of every kind, at its smallest
        for what, n in dict(sorted(cells(args), reverse=True)).items():
            attempt(engine, what, n, 999)
    for index in range(args.rounds):
        for cell, (what, n) in enumerate(cells(args)):
            probes.append(ceilings.call("probe"))
            # The order turns with the rounds, so that no engine always runs on a machine the others have heated.
            turn = index % len(engines)
            for engine in engines[turn:] + engines[:turn]:
                note(f"round {index + 1} of {args.rounds}: {what} {n}, {NAMES[engine.kind]}")
                rate = attempt(engine, what, n, 16 * index + cell + 1)
                if rate is not None:
                    values.setdefault((what, n, engine.kind), []).append(rate)
    return values, probes


def rows_of(
    args: argparse.Namespace, values: Values, work: dict[str, Any], bandwidth: float, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """Medians, shares of the ceilings and ratios, a row for each cell."""
    rows = []
    for what, n in cells(args):
        row: dict[str, Any] = {"cell": what, "tokens": n, "engines": {}}
        for kind in args.engines:
            got = sorted(values.get((what, n, kind), []))
            if not got:
                continue
            entry = {"median": statistics.median(got), "slowest": got[0], "fastest": got[-1]}
            if what == "prefill":
                entry["ops_per_s"] = entry["median"] / n * work["operations"][str(n)]
                entry |= {f"of_{name}_peak": entry["ops_per_s"] / peak for name, peak in peaks.items() if peak}
            elif what == "decode":
                entry["bytes_per_s"] = entry["median"] * work["bytes"][str(n)]
                entry["of_bandwidth"] = entry["bytes_per_s"] / bandwidth
            row["engines"][kind] = entry
        ours = row["engines"].get("native")
        for kind, entry in row["engines"].items():
            if kind != "native" and ours:
                ratio = ours["median"] / entry["median"]
                entry["native_is"] = 1 / ratio if what == "first" else ratio  # times as fast
        rows.append(row)
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    context = max(args.prefill + [n + args.tokens + 8 for n in args.decode + args.generate])
    sources = sources_of(args)
    engines: list[Engine] = []
    missing: list[str] = []
    try:
        start_engines(args, sources, context, engines, missing)
        native, ceilings = engines[0], Engine("ceilings", sys.executable, "", args, context)
        engines.append(ceilings)
        work = native.call("work", args.prefill, args.decode)
        values, probes = time_rounds(args, engines[:-1], ceilings, missing)
        note("")
        about = {e.kind: {**e.about, "peak_memory": e.call("peak_memory")} for e in engines[:-1]}
    finally:
        note("")
        for engine in engines:
            engine.close()
    bandwidth = statistics.median(p["read_bandwidth"] for p in probes)
    peaks = {name: statistics.median(p["peak"][name] for p in probes) for name in probes[0]["peak"]}
    return {
        "source": sources["native"],
        "threads": args.threads,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "machine": machine(),
        "read_bandwidth": {
            "median": bandwidth,
            "slowest": min(p["read_bandwidth"] for p in probes),
            "fastest": max(p["read_bandwidth"] for p in probes),
        },
        "peak": peaks,
        "engines": about,
        "left_out": list(dict.fromkeys(missing)),
        "rows": rows_of(args, values, work, bandwidth, peaks),
    }


def sources_of(args: argparse.Namespace) -> dict[str, str]:
    """Engine -> what it loads."""
    sources: dict[str, str] = {}
    if args.shape:
        path = args.dir / (f"{args.shape}-{args.type}" + ("" if args.type == "hf" else ".gguf"))
        checkpoints.make(path, args.shape, args.type)
        sources["native"] = str(path)
        if args.type == "hf":
            args.hf = args.hf or path
        else:
            sources["llama"] = str(path)
    elif args.model:
        from gemma_native.weights import open_checkpoint

        checkpoint = open_checkpoint(args.model)
        sources["native"] = args.model
        if str(checkpoint.source).endswith(".gguf"):
            sources["llama"] = str(checkpoint.source)
        checkpoint.close()
    else:
        sources["native"] = str(args.hf)
    if args.gguf:
        sources["llama"] = str(args.gguf)
    if args.hf:
        sources |= dict.fromkeys(("ct2", "hf", "ov"), str(args.hf))
    return sources


def machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPUs"


def note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def table(facts: dict[str, Any]) -> str:
    bandwidth = facts["read_bandwidth"]
    lines = [
        f"{facts['source']}, {facts['threads']} threads, {facts['rounds']} rounds; {facts['machine']}",
        f"ceilings: {bandwidth['median'] / 1e9:.1f} GB/s read ({bandwidth['slowest'] / 1e9:.1f} to "
        f"{bandwidth['fastest'] / 1e9:.1f}); peak Gop/s "
        + ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in facts["peak"].items()),
    ]
    for kind, about in facts["engines"].items():
        detail = f"load {about['load_s']:.2f} s, peak memory {about['peak_memory'] / 1e6:,.0f} MB"
        lines.append(f"{NAMES[kind]} {about['version']}: {detail}")
    lines += [f"left out: {text}" for text in facts["left_out"]]
    lines += [
        "",
        "| cell | engine | tokens/s | slowest - fastest | of the ceiling | gemma_native is |",
        "|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        unit, scale = (" ms", 1000) if row["cell"] == "first" else ("", 1)
        for kind, e in row["engines"].items():
            share = ""
            if "of_bandwidth" in e:
                share = f"{100 * e['of_bandwidth']:.0f} % of bandwidth ({e['bytes_per_s'] / 1e9:.1f} GB/s)"
            elif "ops_per_s" in e:
                share = ", ".join(
                    f"{100 * e[f'of_{name}_peak']:.0f} % {name}" for name in facts["peak"] if f"of_{name}_peak" in e
                )
            ratio = f"{e['native_is']:.2f}x" if "native_is" in e else ""
            spread = f"{e['slowest'] * scale:.1f} - {e['fastest'] * scale:.1f}"
            cell = f"{row['cell']} {row['tokens']}"
            lines.append(f"| {cell} | {NAMES[kind]} | {e['median'] * scale:.1f}{unit} | {spread} | {share} | {ratio} |")
    return "\n".join(lines)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='what gemma_native loads: a .gguf file, a directory, "demo"')
    parser.add_argument("--shape", choices=checkpoints.SHAPES, help="or a random checkpoint of this shape")
    parser.add_argument("--type", choices=checkpoints.TYPES, default="Q4_0", help="its encoding")
    parser.add_argument("--dir", type=Path, default=HERE / "checkpoints", help="where random checkpoints are kept")
    parser.add_argument("--gguf", type=Path, help="what llama-cpp-python loads, if not the same file")
    parser.add_argument("--hf", type=Path, help="the same model as a directory, for the other peers")
    parser.add_argument("--engines", default=",".join(NAMES), help="default: all that are installed")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--threads", type=int, default=0, help="default: gemma_native's own choice")
    parser.add_argument("--weights", default="auto", help="gemma_native's: auto, bf16, int8, int4")
    parser.add_argument("--kv", default="bf16", help="gemma_native's: bf16, f32")
    parser.add_argument("--isa", help="force gemma_native's instruction set")
    parser.add_argument("--prefill", type=integers, default=[512, 32], help="default: 512,32")
    parser.add_argument("--decode", type=integers, default=[32], help="contexts; default: 32")
    parser.add_argument("--generate", type=integers, default=[32], help="prompt sizes; default: 32; '' for none")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a cell (default: 32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="keep everything here")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    args = parser.parse_args()
    args.engines = [name for name in args.engines.split(",") if name in NAMES]
    if not args.engines or args.engines[0] != "native":
        args.engines = ["native"] + [name for name in args.engines if name != "native"]  # it probes the ceilings
    if not (args.model or args.shape or args.hf):
        parser.error("one of --model, --shape and --hf is needed")
    if not 1 <= args.tokens <= 512:
        parser.error("--tokens must be between 1 and 512, so that caches can be rewound")
    if not args.threads:
        from gemma_native import _native

        args.threads = _native.default_threads()
    facts = run(args)
    print(table(facts))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()

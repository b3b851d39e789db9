"""The command `gemma-native`: generate, chat, info, bench and quantize.

What goes wrong is told in one line on stderr with exit code 2; Ctrl-C ends with 130; a reader that closes the pipe is no
error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from .gemma import Gemma

PROGRAM = "gemma-native"
SOURCE = 'a directory, a .gguf or packed .safetensors file, a Hub id, or "demo"'
CHAT_HELP = """/reset   forget the conversation
/exit    leave (so does Ctrl-D)
/help    this text
Ctrl-C stops an answer and keeps the conversation."""


class UsageError(Exception):
    """Something that the user can put right."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 (an error, told in one line) or 130 (Ctrl-C)."""
    warnings.showwarning = _show_warning
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    trace = False
    try:
        args = _parser().parse_args(argv)
        trace = args.traceback
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not interrupt the interpreter's shutdown
        return 130
    except BrokenPipeError:
        # What is still buffered has nowhere to go; without this the interpreter complains at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if trace:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        return f"{os.fsdecode(name)}: {error.strerror}" if isinstance(name, (str, bytes)) else error.strerror
    text = " ".join(str(error).split())
    known = isinstance(error, (UsageError, ValueError, MemoryError, RuntimeError, ImportError, OSError))
    return text if known and text else f"{type(error).__name__}: {text} (--traceback shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        print(f"{PROGRAM}: note: {' '.join(str(message).split())}", file=sys.stderr)


# The command line


def _integers(text: str) -> list[int]:
    """'32,512' as [32, 512], each at least 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 32,512") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every number must be at least 1")
    return values


def _count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _bias(text: str) -> tuple[int, float]:
    """'235=-5' as (235, -5.0)."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, for example 235=-5") from None


# Field of SamplingParams -> how its flag is read. Flags that are not given leave SamplingParams' defaults alone.
SAMPLING: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": int, "metavar": "N", "help": "stop after N tokens"},
    "temperature": {"type": float, "metavar": "T", "help": "0 always takes the most likely token"},
    "top_k": {"type": int, "metavar": "K", "help": "choose among the K most likely; 0: all"},
    "top_p": {"type": float, "metavar": "P", "help": "choose among the most likely that sum to P"},
    "min_p": {"type": float, "metavar": "P", "help": "drop tokens below P times the best one's probability"},
    "repetition_penalty": {"type": float, "metavar": "X", "help": "above 1: tokens already there become less likely"},
    "presence_penalty": {"type": float, "metavar": "X", "help": "subtracted once from tokens already generated"},
    "frequency_penalty": {"type": float, "metavar": "X", "help": "subtracted for each time a token was generated"},
    "logit_bias": {"type": _bias, "metavar": "ID=BIAS", "action": "append", "help": "added to a token's logit; repeat"},
    "seed": {"type": int, "metavar": "N", "help": "same seed, same text"},
    "stop": {"metavar": "TEXT", "action": "append", "help": "stop before this text; repeat for several"},
    "stop_tokens": {"type": int, "metavar": "ID", "action": "append", "help": "stop at this token; repeat for several"},
    "speculate": {"action": "store_true", "help": "guess repeated text: the same output, maybe sooner"},
    "ignore_eos": {"action": "store_true", "help": "go on past the end of the text"},
}


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Gemma on this machine: generate text, chat, look into files, measure.")
    from . import __version__

    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--traceback", action="store_true", help="show where in the program an error came from")
        sub.set_defaults(run=run)
        return sub

    def loading(sub: argparse.ArgumentParser, model: bool = True) -> None:
        if model:
            sub.add_argument("--model", required=True, metavar="SOURCE", help=SOURCE)
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
        sub.add_argument("--threads", type=_count, metavar="N", help="default: the physical cores that may be used")
        sub.add_argument("--weights", choices=["auto", "bf16", "int8", "int4"], default="auto", help="auto: as stored")
        sub.add_argument("--kv", choices=["bf16", "f32"], default="bf16", help="precision of the KV cache")

    def generating(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--context", type=_count, metavar="N", help="positions to plan for (default: the model's)")
        sub.add_argument(
            "--deterministic", action="store_true", help="the same bits for any split and batch, on CUDA too"
        )
        group = sub.add_argument_group("sampling")
        for field, how in SAMPLING.items():
            group.add_argument("--" + field.replace("_", "-"), default=argparse.SUPPRESS, **how)

    sub = command("generate", _generate, "continue a prompt")
    sub.add_argument("prompt", nargs="?", help="the text to continue; without it, or for -, standard input is read")
    loading(sub)
    sub.add_argument("--stats", action="store_true", help="tokens/s on stderr at the end")
    sub.add_argument("--n", type=_count, default=argparse.SUPPRESS, metavar="N", help="N answers, not streamed")
    sub.add_argument(
        "--logprobs", type=int, default=argparse.SUPPRESS, metavar="K", help="log-probabilities on stderr, with K best"
    )
    generating(sub)

    sub = command("chat", _chat, "talk with an instruction-tuned model")
    loading(sub)
    sub.add_argument("--system", metavar="TEXT", help="instructions that hold for the whole conversation")
    generating(sub)

    sub = command("info", _info, "describe a checkpoint and this machine, without loading the weights")
    sub.add_argument("model", metavar="SOURCE", help=SOURCE)
    loading(sub, model=False)
    sub.add_argument("--tensors", action="store_true", help="list every tensor")
    sub.add_argument("--json", action="store_true", help="as JSON, every tensor included")

    sub = command("bench", _bench, "measure prefill and decode against this machine's ceilings")
    loading(sub)
    sub.add_argument("--prompts", type=_integers, default=[512], metavar="N,N", help="prefill sizes (default: 512)")
    sub.add_argument("--contexts", type=_integers, default=[128], metavar="N,N", help="decode depths (default: 128)")
    sub.add_argument("--batch", type=_integers, default=[1], metavar="N,N", help="sequences decoded at once")
    sub.add_argument("--tokens", type=_count, default=32, metavar="N", help="decoded a round (default: 32)")
    sub.add_argument("--rounds", type=_count, default=5, metavar="N", help="interleaved rounds (default: 5)")
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("quantize", _quantize, "write a packed file that loads in milliseconds")
    sub.add_argument("source", metavar="SRC", help=SOURCE)
    sub.add_argument("destination", metavar="DST", help="the .safetensors file to write")
    sub.add_argument("--weights", choices=["auto", "int8", "int4"], default="auto", help="auto: as stored")
    sub.add_argument("--threads", type=_count, metavar="N", help="default: the physical cores that may be used")
    sub.add_argument("--force", action="store_true", help="overwrite DST")
    return parser


def _load(args: argparse.Namespace) -> Gemma:
    from .gemma import Gemma

    return Gemma.load(
        args.model,
        device=args.device,
        weights=args.weights,
        kv=args.kv,
        threads=args.threads,
        context=getattr(args, "context", None),
        deterministic=getattr(args, "deterministic", False),
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    from .sampling import SamplingParams

    given = {field: getattr(args, field) for field in [*SAMPLING, "n", "logprobs"] if hasattr(args, field)}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    SamplingParams(**given)  # a value out of range is told before a model is loaded for it
    return given


# generate


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt != "-":
        try:
            args.prompt.encode()
        except UnicodeEncodeError:
            raise UsageError("the prompt is not valid UTF-8") from None
        return str(args.prompt)
    if args.prompt is None and sys.stdin.isatty():
        raise UsageError('no prompt: give one as an argument ("...") or pipe it in')
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not valid UTF-8 (byte {error.start})") from None
    if not text and args.prompt is None:
        raise UsageError("no prompt: standard input is empty")
    return text[:-1] if text.endswith("\n") else text  # echo's own newline is not part of the prompt


def _generate(args: argparse.Namespace) -> None:
    settings = _sampling(args)
    prompt = _prompt(args)
    results: list[Any]
    with _load(args) as gemma:
        try:
            if settings.get("n", 1) > 1:
                answers: Any = gemma.generate(prompt, **settings)  # with n > 1 a list
                results = answers
                for i, result in enumerate(results):
                    print(f"--- {i + 1} of {len(results)}\n{result.text}")
            else:
                stream = gemma.stream(prompt, **settings)
                for piece in stream:
                    print(piece, end="", flush=True)
                print(flush=True)
                results = [stream.result]
        except KeyboardInterrupt:
            print(flush=True)  # the shell's prompt starts on its own line
            raise
        if "logprobs" in settings:
            for result in results:
                _print_logprobs(gemma, result)
        if args.stats:
            print(_stats(results, gemma), file=sys.stderr)


def _print_logprobs(gemma: Gemma, result: Any) -> None:
    from .tokenizer import Detokenizer

    def show(token: int) -> str:
        text = Detokenizer(gemma.tokenizer, start=True)  # a model may have more tokens than its vocabulary has pieces
        return repr(text.push(token) + text.flush())

    for entry in result.logprobs:
        best = "  ".join(f"{show(token)} {value:.3f}" for token, value in entry.top)
        print(f"{show(entry.token)} {entry.logprob:.3f}" + (f"   best: {best}" if best else ""), file=sys.stderr)


def _stats(results: Sequence[Any], gemma: Gemma) -> str:
    prompt, tokens, prefill_s, decode_s, decoded = _totals(results)
    parts = [f"prompt {prompt} tokens"]
    if prefill_s > 0:
        parts[-1] += f", {sum(r.timings['prefill_tokens'] for r in results) / prefill_s:.1f} tokens/s"
    parts.append(f"generated {tokens} tokens" + (f", {decoded / decode_s:.1f} tokens/s" if decode_s > 0 else ""))
    model = gemma.model
    return "; ".join(parts) + f" ({model.device}, {model.isa}, {model.threads} threads)"


def _totals(results: Sequence[Any]) -> tuple[int, int, float, float, int]:
    """(prompt tokens, generated tokens, prefill seconds, decode seconds, tokens those seconds gave)."""
    prompt = sum(r.prompt_tokens for r in results)
    tokens = sum(len(r.tokens) for r in results)
    prefill = sum(r.timings["prefill_s"] for r in results)
    decode = sum(r.timings["decode_s"] for r in results)
    return prompt, tokens, prefill, decode, max(0, tokens - len(results))  # the first token is prefill's


# chat


def _chat(args: argparse.Namespace) -> None:
    settings = _sampling(args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
    with _load(args) as gemma:
        chat = gemma.chat(system=args.system)
        if interactive:
            model = gemma.model
            print(f"{args.model} on {model.device} ({model.isa}, {model.threads} threads); /help lists the commands")
        results: list[Any] = []
        while True:
            answering = False
            try:
                try:
                    line = input("> " if interactive else "").strip()
                    line.encode()  # some locales let bytes that are not UTF-8 pass as surrogates
                except EOFError:
                    break
                except UnicodeError:
                    raise UsageError("standard input is not valid UTF-8") from None
                if not line:
                    continue
                if re.fullmatch(r"/\w+", line):
                    if line in ("/exit", "/quit"):
                        break
                    if line == "/reset":
                        chat.reset()
                        print("(a new conversation)")
                    elif line == "/help":
                        print(CHAT_HELP)
                    else:
                        print(f"(no command {line}; /help lists them)")
                    continue
                answering = True
                _answer(chat, line, settings, results)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n(stopped)" if answering else "\n(Ctrl-D or /exit leaves)", flush=True)
        if interactive:
            print()
        if results:
            _, tokens, _, decode_s, decoded = _totals(results)
            speed = f", {decoded / decode_s:.1f} tokens/s" if decode_s > 0 and decoded else ""
            print(f"{tokens} tokens generated{speed}", file=sys.stderr)


def _answer(chat: Any, line: str, settings: dict[str, Any], results: list[Any]) -> None:
    stream = chat.stream(line, **settings)
    try:
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
    except ValueError as error:  # a full context, for one: the conversation can still be reset
        if not sys.stdin.isatty():
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
    finally:
        stream.close()
        if getattr(stream, "result", None) is not None:
            results.append(stream.result)


# info, bench


def _info(args: argparse.Namespace) -> None:
    from .measure import describe, describe_text

    facts = describe(args.model, device=args.device, weights=args.weights, kv=args.kv, threads=args.threads)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(describe_text(facts, every_tensor=args.tensors))


def _bench(args: argparse.Namespace) -> None:
    from .measure import bench, bench_text

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    with _load(args) as gemma:
        try:
            facts = bench(
                gemma.model,
                prompts=args.prompts,
                contexts=args.contexts,
                batches=args.batch,
                tokens=args.tokens,
                rounds=args.rounds,
                progress=progress,
            )
        finally:
            progress("")
    facts = {"model": args.model, **facts}
    print(json.dumps(facts, indent=2) if args.json else bench_text(facts))


# quantize


def _quantize(args: argparse.Namespace) -> None:
    from .packed import save_packed
    from .weights import open_checkpoint

    target = os.path.realpath(args.destination)
    if not target.endswith(".safetensors"):
        raise UsageError(f"{args.destination}: the name of a packed file ends in .safetensors")
    if os.path.isdir(target):
        raise UsageError(f"{args.destination} is a directory; name a .safetensors file")
    if os.path.exists(target) and not args.force:
        raise UsageError(f"{args.destination} exists; --force overwrites it")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such directory")
    if os.path.exists(args.source) and os.path.exists(target) and os.path.samefile(args.source, target):
        raise UsageError(f"{args.destination} is the source itself; write to another name")

    started = time.perf_counter()
    checkpoint = open_checkpoint(args.source)
    try:
        tokenizer = checkpoint.tokenizer().proto if checkpoint.tokenizer is not None else None
        model = checkpoint.model(device="cpu", threads=args.threads, weights=args.weights)
        # Written under another name first: what stood at DST stays until the new file is whole.
        save_packed(target, checkpoint.config, model.packed(), tokenizer, checkpoint.chat_template)
    finally:
        checkpoint.close()
    size = os.path.getsize(target)
    print(f"{args.destination}: {size / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

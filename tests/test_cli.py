"""The command line, as a user meets it: real processes, a tiny random checkpoint, and a terminal for `chat`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tiny import write_hf

from gemma_native import Gemma, SamplingParams, cli

COMMAND = [sys.executable, "-m", "gemma_native"]
TEXT = "the cat sat on the mat and the dog sat on the log while a bird sang in the tree above them all day long"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 1 of two layers with a SentencePiece vocabulary of 512 pieces."""
    folder = tmp_path_factory.mktemp("model")
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 50),
        model_writer=proto,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(proto.getvalue())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return write_hf(folder, "gemma-mqa", vocab_size=512, max_position_embeddings=65536, **sizes)


def run(*arguments: object, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the command; without `stdin` it reads from nothing."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def refused(result: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Exit code 2 and one line on stderr that holds the words."""
    error = result.stderr.decode()
    assert result.returncode == 2, error
    lines = [line for line in error.splitlines() if not line.startswith("gemma-native: note:")]
    assert len(lines) == 1 and lines[0].startswith("gemma-native: error: "), error
    assert "Traceback" not in error
    for word in words:
        assert word in lines[0], error


def test_help_and_version() -> None:
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in ("generate", "chat", "info", "bench"))):
        result = run(*arguments)
        assert result.returncode == 0 and b"gemma-native" in result.stdout and not result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["sing"], ["sing"]),
        (["generate", "Hi"], ["--model"]),
        (["generate", "--model", "no/such.gguf", "Hi"], ["no/such.gguf"]),
        (["generate", "--model", "{model}", "--temperature", "-1", "Hi"], ["temperature"]),
        (["generate", "--model", "{model}", "--top-p", "1.5", "Hi"], ["top_p"]),
        (["generate", "--model", "{model}", "--temperature", "hot", "Hi"], ["hot"]),
        (["generate", "--model", "{model}", "--threads", "0", "Hi"], ["--threads"]),
        (["generate", "--model", "{model}", "--device", "toaster", "Hi"], ["toaster"]),
        (["generate", "--model", "{model}", "--logit-bias", "5", "Hi"], ["ID=BIAS"]),
        (["generate", "--model", "{model}", "--context", "100000", "Hi"], ["100000"]),
        (["generate", "--model", "{model}"], ["prompt"]),
        (["generate", "--model", "{broken}", "Hi"], ["broken.gguf"]),
        (["info", "{broken}"], ["broken.gguf"]),
        (["info", "{empty}"], ["config.json"]),
        (["bench", "--model", "{model}", "--prompts", "90000"], ["90000"]),
        (["bench", "--model", "{model}", "--prompts", "0"], ["--prompts"]),
        (["quantize", "{model}", "out.bin"], [".safetensors"]),
        (["quantize", "{model}", "no/such/out.safetensors"], ["no such directory"]),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: list[str], model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    (tmp_path / "empty").mkdir()
    places = {"model": model, "broken": broken, "empty": tmp_path / "empty"}
    refused(run(*(text.format(**places) for text in arguments)), *words)


def test_unknown_instruction_set_is_one_line(model: Path) -> None:
    refused(run("generate", "--model", model, "Hi", GEMMA_NATIVE_ISA="mmx"), "GEMMA_NATIVE_ISA", "mmx")


def test_every_sampling_setting_has_a_flag() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == {*cli.SAMPLING, "n", "logprobs"}


def test_generate(model: Path) -> None:
    with Gemma.load(model) as gemma:
        expected = gemma.generate("the cat", max_tokens=12, temperature=0).text
    options = ["--model", model, "--max-tokens", 12, "--temperature", 0]
    for result in (
        run("generate", *options, "the cat"),
        run("generate", *options, stdin=b"the cat"),
        run("generate", *options, stdin=b"the cat\n"),
        run("generate", *options, "-", stdin=b"the cat"),
        run("generate", *options, "the cat", stdin=b"not read"),
    ):
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode() == expected + "\n" and not result.stderr


def test_generate_options(model: Path) -> None:
    options = ["--model", model, "--max-tokens", 8, "--seed", 3, "--temperature", 1.2, "--ignore-eos"]
    first, again = run("generate", *options, "a dog"), run("generate", *options, "a dog", "--stats")
    assert first.returncode == again.returncode == 0
    assert first.stdout == again.stdout
    assert b"tokens/s" in again.stderr and b"tokens/s" not in again.stdout
    several = run("generate", *options, "--n", 3, "a dog")
    assert several.returncode == 0 and several.stdout.count(b"--- ") == 3
    chosen = run("generate", "--model", model, "--logit-bias", "300=1000", "--max-tokens", 1, "--logprobs", 2, "a")
    assert chosen.returncode == 0 and len(chosen.stderr.splitlines()) == 1
    refused(run("generate", "--model", model, stdin=b"caf\xff"), "UTF-8")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_closed_standard_streams(model: Path) -> None:
    def shell(text: str) -> subprocess.CompletedProcess[bytes]:
        line = " ".join([*COMMAND, text.format(model=model)])
        return subprocess.run(["sh", "-c", line], capture_output=True, timeout=60)

    for text in ("generate --model {model} --max-tokens 3 hi >&-", "info {model} >&-"):
        result = shell(text)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b""), text
    refused(shell("generate --model {model} <&-"), "no prompt")
    assert shell("chat --model {model} <&-").returncode == 0
    result = shell("generate --model {model} --max-tokens 3 --stats hi 2>&-")
    assert result.returncode == 0 and b"tokens/s" not in result.stdout


def test_log_probabilities_of_tokens_past_the_vocabulary(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model may have more rows than its vocabulary has pieces."""
    with Gemma.load(model) as gemma:
        assert gemma.tokenizer.vocab_size <= 511 < gemma.config.vocab_size
        out = gemma.generate("a", max_tokens=1, logit_bias={511: 1000.0}, logprobs=0)
        cli._print_logprobs(gemma, out)
    assert out.tokens == [511] and capsys.readouterr().err.startswith("'' ")


def test_chat_takes_utf8_alone(model: Path) -> None:
    for locale in ("C", "C.UTF-8"):
        refused(run("chat", "--model", model, stdin=b"caf\xe9\n", LC_ALL=locale), "UTF-8")


def test_closed_pipe_is_quiet(model: Path) -> None:
    command = [*COMMAND, "generate", "--model", str(model), "--max-tokens", "4000", "--ignore-eos", "a"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0 and not error


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt(model: Path) -> None:
    command = [*COMMAND, "generate", "--model", str(model), "--max-tokens", "60000", "--ignore-eos", "a"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in error


class Terminal:
    """A process at the other end of a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        import pty

        self.got = b""
        self.process, self.fd = pty.fork()
        if self.process == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*COMMAND, *map(str, arguments)])

    def interrupt(self, text: str) -> None:
        """Ctrl-C, until `text` comes: pressed again if the moment was one in which nobody heeds it."""
        for _ in range(3):
            self.send("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(text, 15)
        raise AssertionError(f"Ctrl-C did not give {text!r}")

    def until(self, text: str, seconds: float = 60) -> None:
        """Reads up to and with `text`; what came behind it is for the next call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.got:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                break
            try:
                self.got += os.read(self.fd, 1024)
            except OSError:  # the other end is closed
                break
        before, found, self.got = self.got.partition(text.encode())
        assert found, f"{text!r} did not come: {before!r}"

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        while select.select([self.fd], [], [], 30)[0]:
            try:
                if not os.read(self.fd, 1024):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def chat(model: Path) -> Iterator[Terminal]:
    pytest.importorskip("pty")
    # 5 is <end_of_turn>, which would end an answer of the random model before it can be interrupted.
    endless = ["--max-tokens", 60000, "--ignore-eos", "--logit-bias", "5=-inf"]
    terminal = Terminal("chat", "--model", model, "--threads", 1, *endless)
    yield terminal
    os.close(terminal.fd)


def test_chat_in_a_terminal(chat: Terminal) -> None:
    chat.until("/help")
    chat.until("> ")
    chat.send("/help\r")
    chat.until("Ctrl-C")
    chat.until("> ")
    chat.send("hello there\r")
    chat.until("\n")  # the echo
    time.sleep(0.5)  # some of the 60,000 tokens
    chat.interrupt("(stopped)")
    chat.until("> ")
    chat.send("/reset\r")
    chat.until("new conversation")
    chat.until("> ")
    chat.send("/dance\r")
    chat.until("no command")
    chat.until("> ")
    time.sleep(0.5)  # readline shows its prompt a little before it heeds signals
    chat.interrupt("Ctrl-D")
    chat.until("> ")
    chat.send("\x04")
    chat.until("tokens/s")
    assert chat.wait() == 0


def test_chat_through_a_pipe(model: Path) -> None:
    result = run(
        "chat", "--model", model, "--max-tokens", 5, "--system", "Be brief.", stdin=b"one\n/reset\ntwo\n/exit\nthree\n"
    )
    assert result.returncode == 0, result.stderr
    assert b"tokens generated" in result.stderr


def test_info(model: Path) -> None:
    with Gemma.load(model, weights="int8") as gemma:
        nbytes, per_token = gemma.model.nbytes, gemma.model.kv_bytes_per_token
    facts = json.loads(run("info", model, "--weights", "int8", "--json").stdout)
    assert facts["memory"]["weights"] == nbytes
    assert facts["memory"]["kv_per_token"] == per_token
    assert facts["config"]["hidden_size"] == 64 and facts["tokenizer"] is True
    assert facts["machine"]["device"] in ("cpu", "cuda") and facts["machine"]["threads"] >= 1
    assert len(facts["tensors"]) == 20
    text = run("info", model, "--tensors").stdout.decode()
    assert "BF16" in text and "model.layers.1.mlp.down_proj.weight" in text and facts["machine"]["isa"] in text


def test_bench(model: Path) -> None:
    options = ["--prompts", "8,40", "--contexts", 16, "--batch", "1,3", "--tokens", 4, "--rounds", 2, "--device", "cpu"]
    result = run("bench", "--model", model, *options, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [(r["what"], r["tokens"], r["batch"]) for r in facts["results"]] == [
        ("prefill", 8, 1),
        ("prefill", 40, 1),
        ("decode", 16, 1),
        ("decode", 16, 3),
    ]
    assert facts["read_bandwidth"] > 0 and all(r["tokens_per_s"] > 0 for r in facts["results"])


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_quantize(weights: str, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed.safetensors"
    result = run("quantize", model, target, "--weights", weights)
    assert result.returncode == 0, result.stderr
    with Gemma.load(model, weights=weights) as gemma, Gemma.load(target) as packed:
        ids = gemma.tokenizer.encode(TEXT)
        assert packed.tokenizer.encode(TEXT) == ids
        logits = gemma.model.forward(ids, gemma.model.new_cache())
        np.testing.assert_array_equal(packed.model.forward(ids, packed.model.new_cache()), logits)
    assert run("info", target).returncode == 0

    before = target.read_bytes()
    refused(run("quantize", model, target), "--force")
    assert target.read_bytes() == before
    assert run("quantize", model, target, "--weights", weights, "--force").returncode == 0
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == [target.name]


def test_failed_quantize_leaves_everything(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr("gemma_native.packed.os.replace", disk_full)
    target = tmp_path / "packed.safetensors"
    target.write_bytes(b"precious")
    assert cli.main(["quantize", str(model), str(target), "--force"]) == 2
    assert target.read_bytes() == b"precious" and os.listdir(tmp_path) == [target.name]

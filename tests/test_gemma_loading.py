"""Gemma around tiny real checkpoints: loading, pickling, and the process around it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_native
import numpy as np
import pytest
import tiny
from fake_native import BOS, in_thread

from gemma_native import Gemma, _native

WORDS = fake_native.tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_hf(tmp_path_factory.mktemp("load"), "gemma3-mqa", 1)
    (folder / "tokenizer.model").write_bytes(WORDS.proto)
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Gemma:
    return Gemma.load(folder, device="cpu", threads=2)


def test_a_real_checkpoint_from_text_to_text(real: Gemma) -> None:
    prompts = ["hello world", "the", "", "a b c d e " * 20]
    for settings in ({"temperature": 0}, {"seed": 1, "top_k": 20}, {"seed": 1, "top_p": 0.9}):
        alone = [real.generate(p, max_tokens=12, **settings) for p in prompts]
        assert [o.tokens for o in real.generate(prompts, max_tokens=12, **settings)] == [o.tokens for o in alone]
        for prompt, out in zip(prompts, alone, strict=True):
            stream = real.stream(prompt, max_tokens=12, **settings)
            assert "".join(stream) == out.text
    cache = real.model.new_cache()
    tokens = WORDS.encode("hello world")
    out = real.generate(tokens, max_tokens=8, temperature=0, ignore_eos=True)
    found = []
    step = tokens
    for _ in range(8):
        step = [int(np.argmax(real.model.forward(step, cache)))]
        found += step
    assert out.tokens == found


def test_score_of_a_real_checkpoint_agrees_with_logprobs(real: Gemma) -> None:
    out = real.generate("hello", max_tokens=10, seed=1, logprobs=0, ignore_eos=True)
    assert out.logprobs is not None
    scored = real.score(WORDS.encode("hello") + out.tokens).logprobs[-len(out.tokens) :]
    assert [entry.logprob for entry in out.logprobs] == pytest.approx(list(scored), abs=1e-4)


def test_pickle_goes_by_source(real: Gemma) -> None:
    data = pickle.dumps(real)
    assert len(data) < 1000
    with pickle.loads(data) as again:
        assert (
            again.generate("hello", max_tokens=5, temperature=0).tokens
            == real.generate("hello", max_tokens=5, temperature=0).tokens
        )
        assert again.model.threads == real.model.threads


def test_pickles_hold_plain_numbers(folder: Path) -> None:
    """An application that keeps them need not have the NumPy that wrote them."""
    with Gemma.load(folder, device="cpu", threads=np.int64(1), context=np.int32(50)) as gemma:
        assert b"numpy" not in pickle.dumps(gemma)


def test_cancel_during_a_real_prefill(real: Gemma) -> None:
    thread, out = in_thread(lambda: real.generate([BOS] * 1500, max_tokens=500, ignore_eos=True))
    while thread.is_alive():  # the call may not have begun yet
        real.cancel()
        time.sleep(0.005)
    assert out[0].finish_reason == "cancelled"
    assert real.generate("hello", max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_load_options(folder: Path) -> None:
    with Gemma.load(str(folder), device="cpu", context=12, kv="f32", threads=1) as gemma:
        assert gemma.model.kv == "f32"
        assert gemma.model.threads == 1
        assert len(gemma.generate([BOS] * 10, ignore_eos=True).tokens) == 3
        assert gemma.config.context_length == 2048
    assert Gemma.load(folder, device="cpu", threads=np.int64(2)).model.threads == 2  # type: ignore[arg-type]
    for options, error, name in [
        ({"context": 0}, ValueError, "context"), ({"context": 2049}, ValueError, "2048"), ({"context": 1.5}, TypeError, "context"),
        ({"device": "tpu"}, ValueError, "tpu"), ({"weights": "int3"}, ValueError, "int3"), ({"kv": "f16"}, ValueError, "f16"),
        ({"threads": 0}, ValueError, "threads"), ({"threads": -2}, ValueError, "threads"),
        ({"threads": "2"}, TypeError, "^threads must be an integer or None, not '2'$"), ({"threads": True}, TypeError, "threads"),
        ({"device": None}, TypeError, "^device must be a string"), ({"weights": None}, TypeError, "^weights must be a string"),
        ({"kv": 16}, TypeError, "^kv must be a string"), ({"deterministic": "yes"}, TypeError, "^deterministic must be True or False"),
    ]:  # fmt: skip
        with pytest.raises(error, match=name):
            Gemma.load(folder, **{"device": "cpu", **options})  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Gemma.load(folder / "nowhere")
    if _native.cuda_status():
        with pytest.raises(RuntimeError):
            Gemma.load(folder, device="cuda")
        with Gemma.load(folder) as gemma:
            assert gemma.model.device == "cpu"


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_weights_and_progress(folder: Path, weights: Any) -> None:
    calls: list[tuple[int, int]] = []
    with Gemma.load(
        folder, device="cpu", weights=weights, progress=lambda done, total: calls.append((done, total))
    ) as gemma:
        gemma.generate("hello", max_tokens=2)
        encoding = gemma.model.encodings()["model.layers.0.mlp.gate_proj.weight"]
    assert (encoding == "BF16") == (weights == "bf16")
    if weights != "bf16":  # used where it lies, so there is nothing to tell
        assert calls
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1][0] <= calls[-1][1]


def test_a_tokenizer_larger_than_the_embedding_warns(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "m", "gemma-mqa", 1, vocab_size=295)
    (folder / "tokenizer.model").write_bytes(WORDS.proto)
    with pytest.warns(UserWarning, match="295 rows"):
        gemma = Gemma.load(folder, device="cpu")
        gemma.tokenizer  # noqa: B018
    assert WORDS.vocab_size > 295
    with pytest.raises(ValueError, match="295"):
        gemma.generate(WORDS.decode([WORDS.vocab_size - 1]))
    assert gemma.generate("hello"[:1], max_tokens=2).prompt_tokens == 2


def test_a_directory_without_a_tokenizer_loads(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "m", "gemma-mqa", 1)
    with Gemma.load(folder, device="cpu") as gemma:
        assert len(gemma.generate([BOS, 5], max_tokens=4, ignore_eos=True).tokens) == 4
        with pytest.raises(ValueError, match="tokenizer"):
            gemma.generate("hello")


# --- processes ---


def run(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork_a_call_works_or_raises(folder: Path) -> None:
    code = """
import os, sys, warnings
from gemma_native import Gemma
warnings.simplefilter("ignore")
gemma = Gemma.load(sys.argv[1], device="cpu", threads=2)
before = gemma.generate("hello", max_tokens=5, temperature=0).tokens
child = os.fork()
if not child:
    try:
        ok = gemma.generate("hello", max_tokens=5, temperature=0).tokens == before
    except RuntimeError:
        ok = True
    os._exit(0 if ok else 3)
status = os.waitpid(child, 0)[1]
assert gemma.generate("hello", max_tokens=5, temperature=0).tokens == before
sys.exit(os.waitstatus_to_exitcode(status))
"""
    out = run(code, str(folder))
    assert out.returncode == 0, out.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_ctrl_c_during_a_prefill(folder: Path) -> None:
    code = """
import os, signal, sys, threading, time
from gemma_native import Gemma
gemma = Gemma.load(sys.argv[1], device="cpu", threads=1)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        gemma.generate([2] * 2000, max_tokens=1)
except KeyboardInterrupt:
    print(gemma.generate("hello", max_tokens=3, ignore_eos=True).finish_reason)
"""
    out = run(code, str(folder))
    assert (out.returncode, out.stdout.strip()) == (0, "length"), out.stderr
    assert signal.SIGINT


@pytest.mark.parametrize(
    "call",
    [
        "gemma.drop_cache(); gemma.generate([2] * 1000, max_tokens=1)",
        "gemma.generate([2] * 20, max_tokens=2)",
        "gemma.score([2] * 2000)",
        "Sampler(SamplingParams(repetition_penalty=2.0), [2] * 1000).changed(300)",
        "Gemma.load(sys.argv[1], device='cpu', threads=1)",
        "Gemma.load(sys.argv[1], device='cpu', threads=1, weights='int8')",
        "words.encode('hello world ' * 20)",
        "Tokenizer.from_sentencepiece(words.proto)",
    ],
)
def test_the_process_may_end_while_threads_are_in_the_engine(folder: Path, tmp_path: Path, call: str) -> None:
    vocabulary = tmp_path / "tokenizer.model"
    vocabulary.write_bytes(fake_native.tokenizer().proto)
    code = f"""
import ctypes, sys, threading, time
from gemma_native import Gemma, SamplingParams
from gemma_native.sampling import Sampler
from gemma_native.tokenizer import Tokenizer
words = Tokenizer.from_sentencepiece(open(sys.argv[2], "rb").read())
gemma = Gemma.load(sys.argv[1], device="cpu", threads=1)
def work():
    while True:
        {call}
for _ in range(16):
    threading.Thread(target=work, daemon=True).start()
if sys.platform == "linux":  # some time for them after the interpreter's end
    c = ctypes.CDLL(None)
    c.__cxa_atexit(c.usleep, 50_000, None)
time.sleep(0.1)
print("the end")
"""
    out = run(code, str(folder), str(vocabulary))
    assert (out.returncode, out.stdout.strip()) == (0, "the end"), out.stderr


def test_an_exit_handler_may_wait_for_a_thread_in_the_tokenizer(tmp_path: Path) -> None:
    vocabulary = tmp_path / "tokenizer.model"
    vocabulary.write_bytes(fake_native.tokenizer().proto)
    code = """
import atexit, sys, threading
stop = threading.Event()
def work():
    while not stop.is_set():
        words.encode("hello world")
    for _ in range(100):
        words.encode("hello world")
thread = threading.Thread(target=work, daemon=True)
atexit.register(lambda: (stop.set(), thread.join(), print("the end")))  # runs after the tokenizer's own
from gemma_native.tokenizer import Tokenizer
words = Tokenizer.from_sentencepiece(open(sys.argv[1], "rb").read())
thread.start()
"""
    out = run(code, str(vocabulary))
    assert (out.returncode, out.stdout.strip()) == (0, "the end"), out.stderr


def test_import_is_light() -> None:
    code = "import sys, gemma_native; gemma_native.SamplingParams; print(*sys.modules)"
    loaded = set(run(code).stdout.split())
    assert "gemma_native" in loaded
    assert not loaded & {"sentencepiece", "tqdm", "huggingface_hub", "gguf", "safetensors"}

"""An engine to be measured, in a process of its own: what compare.py starts and asks.

    python bench/engines.py llama --source m.gguf --threads 2 --context 512

Answers one JSON request a line, {"call": NAME, "args": [...]}, after a first line about itself. An engine can do:
    prefill(n, salt) -> seconds    decode(context, tokens) -> seconds    generate(n, tokens, salt) -> seconds
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prompt(n: int, salt: int) -> list[int]:
    """n token ids that every vocabulary has; another salt shares no prefix."""
    return [2] + [(7919 * (i + 1) + 104729 * salt) % 900 + 100 for i in range(n - 1)]


class Native:
    def __init__(self, args: argparse.Namespace) -> None:
        from gemma_native import Gemma

        self.gemma = Gemma.load(args.source, device="cpu", weights=args.weights, kv=args.kv, threads=args.threads)
        self.model = self.gemma.model
        self.cache = self.model.new_cache(args.context)
        self.caches: dict[int, Any] = {}

    def about(self) -> dict[str, Any]:
        import gemma_native

        return {
            "version": gemma_native.__version__,
            "isa": self.model.isa,
            "threads": self.model.threads,
            "weight_bytes": self.model.nbytes,
            "encodings": sorted(set(self.model.encodings().values())),
        }

    def work(self, prompts: list[int], contexts: list[int]) -> dict[str, Any]:
        """Operations of a prefill and bytes of a decode step, the same for every engine on this model."""
        from gemma_native.measure import kv_bytes, operations

        config = self.model.config
        return {
            "operations": {str(n): operations(config, n) for n in prompts},
            "bytes": {str(n): self.model.nbytes + kv_bytes(config, n, self.model.kv, rings=False) for n in contexts},
        }

    def prefill(self, n: int, salt: int) -> float:
        self.cache.truncate(0)
        ids = prompt(n, salt)
        started = time.perf_counter()
        self.model.forward(ids, self.cache, top_k=1)
        return time.perf_counter() - started

    def decode(self, context: int, tokens: int) -> float:
        cache = self.caches.get(context)
        if cache is None:
            cache = self.caches[context] = self.model.new_cache(context + tokens)
            self.model.forward(prompt(context, 0), cache, top_k=1)
        token = 5
        started = time.perf_counter()
        for _ in range(tokens):
            ids, _ = self.model.forward([token], cache, top_k=1)
            token = int(ids[0])
        seconds = time.perf_counter() - started
        cache.truncate(context)
        return seconds

    def generate(self, n: int, tokens: int, salt: int) -> float:
        wanted = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        started = time.perf_counter()
        if self.gemma.has_tokenizer:
            for _ in self.gemma.stream(prompt(n, salt), **wanted):
                pass
        else:  # no text to stream
            self.gemma.generate(prompt(n, salt), **wanted)
        return time.perf_counter() - started


class Ceilings:
    """The machine's own limits, in a process of its own so that no engine's peak memory counts the probe's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.threads = args.threads

    def about(self) -> dict[str, Any]:
        return {}

    def probe(self) -> dict[str, Any]:
        from gemma_native import _native

        return {
            "read_bandwidth": _native.measure_read_bandwidth(self.threads),
            "peak": _native.measure_peak(self.threads),
        }


class Llama:
    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp
        import numpy as np

        self.np = np
        self.api = llama_cpp
        self.llm = llama_cpp.Llama(
            model_path=args.source,
            n_ctx=args.context,
            n_batch=512,
            n_ubatch=512,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            n_gpu_layers=0,
            verbose=False,
        )
        self.depth = -1

    def about(self) -> dict[str, Any]:
        return {"version": self.api.__version__, "system": self.api.llama_print_system_info().decode(errors="replace")}

    def _choice(self) -> int:
        logits = self.api.llama_get_logits_ith(self.llm.ctx, -1)
        return int(self.np.argmax(self.np.ctypeslib.as_array(logits, (self.llm.n_vocab(),))))

    def prefill(self, n: int, salt: int) -> float:
        self.depth = -1
        self.llm.reset()
        ids = prompt(n, salt)
        started = time.perf_counter()
        self.llm.eval(ids)
        self._choice()
        return time.perf_counter() - started

    def decode(self, context: int, tokens: int) -> float:
        if self.depth != context:
            self.llm.reset()
            self.llm.eval(prompt(context, 0))
            self.depth = context
        self.llm.n_tokens = context  # eval drops what lies behind
        token = 5
        started = time.perf_counter()
        for _ in range(tokens):
            self.llm.eval([token])
            token = self._choice()
        return time.perf_counter() - started

    def generate(self, n: int, tokens: int, salt: int) -> float:
        self.depth = -1
        self.llm.reset()
        started = time.perf_counter()
        for i, _ in enumerate(self.llm.generate(prompt(n, salt), temp=0.0), 1):
            if i == tokens:
                break
        return time.perf_counter() - started


class Transformers:
    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        self.torch = torch
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        torch.set_num_threads(args.threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(args.source, torch_dtype=torch.bfloat16).eval()
        self.filled: dict[int, Any] = {}

    def about(self) -> dict[str, Any]:
        return {"version": self.version}

    def _step(self, ids: list[int], cache: Any) -> tuple[int, Any]:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    def prefill(self, n: int, salt: int) -> float:
        ids = prompt(n, salt)
        started = time.perf_counter()
        self._step(ids, None)
        return time.perf_counter() - started

    def decode(self, context: int, tokens: int) -> float:
        if context not in self.filled:
            self.filled[context] = self._step(prompt(context, 0), None)[1]
        cache, token = self.filled[context], 5
        started = time.perf_counter()
        for _ in range(tokens):
            token, cache = self._step([token], cache)
        seconds = time.perf_counter() - started
        cache.crop(context)
        return seconds

    def generate(self, n: int, tokens: int, salt: int) -> float:
        ids = self.torch.tensor([prompt(n, salt)])
        started = time.perf_counter()
        self.model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        return time.perf_counter() - started


class ByGenerate:
    """Engines that offer nothing but a whole generation: a prefill is one of a single token, decoding what more tokens add."""

    version: str

    def about(self) -> dict[str, Any]:
        return {"version": self.version}

    def generate(self, n: int, tokens: int, salt: int) -> float:
        raise NotImplementedError

    def prefill(self, n: int, salt: int) -> float:
        return self.generate(n, 1, salt)

    def decode(self, context: int, tokens: int) -> float:
        seconds = self.generate(context, tokens + 1, 0) - self.generate(context, 1, 0)
        if seconds <= 0:
            raise RuntimeError("lost in the noise between two generations")
        return seconds


def converted(source: Path, marker: str, suffix: str, convert: Callable[[Path], Any]) -> Path:
    """`source` if it holds the file `marker`, else its copy in another format, made once beside it by `convert(target)`."""
    if (source / marker).exists():
        return source
    target = source.with_name(source.name + suffix)
    if not target.exists():
        unfinished = target.with_name(target.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        convert(unfinished)
        unfinished.rename(target)
    return target


class CTranslate2(ByGenerate):
    def __init__(self, args: argparse.Namespace) -> None:
        import ctranslate2

        def convert(target: Path) -> None:  # needs transformers and torch
            ctranslate2.converters.TransformersConverter(args.source).convert(str(target), quantization="int8")

        self.version = f"{ctranslate2.__version__}, int8"
        source = converted(Path(args.source), "model.bin", "-ct2-int8", convert)
        self.generator = ctranslate2.Generator(str(source), device="cpu", intra_threads=args.threads)
        self.pieces = json.loads((source / "vocabulary.json").read_text())

    def generate(self, n: int, tokens: int, salt: int) -> float:
        pieces = [self.pieces[i] for i in prompt(n, salt)]
        started = time.perf_counter()
        self.generator.generate_batch(
            [pieces], min_length=tokens, max_length=tokens, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - started


class OpenVINO(ByGenerate):
    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        def convert(target: Path) -> None:
            from optimum.intel import OVModelForCausalLM

            model = OVModelForCausalLM.from_pretrained(args.source, export=True, load_in_8bit=True, compile=False)
            model.save_pretrained(target)

        self.np, self.openvino = np, openvino
        self.version = f"{openvino_genai.__version__}, int8"
        source = converted(Path(args.source), "openvino_model.xml", "-openvino-int8", convert)
        plain = openvino_genai.SchedulerConfig()
        plain.enable_prefix_caching = False  # a prompt is measured again and again
        self.pipeline = openvino_genai.LLMPipeline(
            str(source), "CPU", scheduler_config=plain, INFERENCE_NUM_THREADS=args.threads
        )

    def generate(self, n: int, tokens: int, salt: int) -> float:
        ids = self.openvino.Tensor(self.np.array([prompt(n, salt)]))
        started = time.perf_counter()
        got = self.pipeline.generate(ids, max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        seconds = time.perf_counter() - started
        if len(got.tokens[0]) != tokens:
            raise RuntimeError(f"{len(got.tokens[0])} tokens of {tokens}")
        return seconds


ENGINES = {
    "ceilings": Ceilings,
    "native": Native,
    "llama": Llama,
    "ct2": CTranslate2,
    "hf": Transformers,
    "ov": OpenVINO,
}


def worker(args: argparse.Namespace) -> None:
    """Answers one JSON request a line; what libraries print goes to stderr."""
    import resource

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")

    try:
        started = time.perf_counter()
        engine: Any = ENGINES[args.engine](args)
        answer({"load_s": time.perf_counter() - started, **engine.about()})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["call"] == "peak_memory":
                answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            else:
                answer(getattr(engine, request["call"])(*request["args"]))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--source", required=True, help="what it loads")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens that must fit")
    parser.add_argument("--weights", default="auto", help="gemma_native's")
    parser.add_argument("--kv", default="bf16", help="gemma_native's")
    worker(parser.parse_args())


if __name__ == "__main__":
    main()

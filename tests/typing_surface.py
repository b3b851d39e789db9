"""What a user's type checker must accept: `mypy --strict` runs on this file, nothing executes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma_native import Gemma, Model, SamplingParams


def high_level() -> None:
    with Gemma.load("demo", device="auto", weights="int8", kv="bf16", threads=2, context=4096) as gemma:
        out = gemma.generate("The capital of France is", max_tokens=32, temperature=0)
        text: str = out.text
        tokens: list[int] = list(out.tokens)
        reason: str = out.finish_reason
        prompt_tokens: int = out.prompt_tokens
        print(text, tokens, reason, prompt_tokens, out.timings, str(out))

        many = gemma.generate(["One", "Two"], max_tokens=4)
        print([one.text for one in many])
        by_ids = gemma.generate([2, 651, 6037], max_tokens=4)
        print(by_ids.text)
        params = SamplingParams(
            max_tokens=8,
            temperature=0.7,
            top_k=40,
            top_p=0.9,
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            frequency_penalty=0.1,
            logit_bias={235: -5.0},
            seed=1,
            stop=["\n"],
            stop_tokens=[107],
            ignore_eos=False,
            logprobs=3,
            n=1,
        )
        print(gemma.generate("Again", params).text)

        stream = gemma.stream("Once upon a time", max_tokens=8)
        for piece in stream:
            upper: str = piece.upper()
            print(upper)
        print(stream.result)
        stream.cancel()
        stream.close()

        chat = gemma.chat(system="Be brief.")
        print(chat.send("Hi").text)
        for piece in chat.stream("And?"):
            print(piece)

        score = gemma.score("some text")
        print(float(score.perplexity), [float(x) for x in score.logprobs])
        print(gemma.infill("def f(", "return x").text)
        ids: list[int] = gemma.tokenizer.encode("text", bos=True, special=False)
        back: str = gemma.tokenizer.decode(ids)
        print(back, gemma.config.hidden_size)
        gemma.cancel()


def low_level(model: Model) -> None:
    cache = model.new_cache(capacity=128)
    logits: NDArray[np.float32] = model.forward([2, 5], cache)
    every: NDArray[np.float32] = model.forward(np.array([7], np.int32), cache, all_logits=True)
    batch: NDArray[np.float32] = model.forward_batch([[1], [2, 3]], [cache, cache.clone()])
    ids, values = model.forward([5], cache, top_k=3)
    logprobs: NDArray[np.float32] = model.score([5, 6], cache)
    cache.truncate(cache.length - 1)
    print(logits, every, batch, ids, values, logprobs)

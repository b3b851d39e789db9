"""Configs: what is read from both dialects of config.json and from GGUF metadata, and that absurd values are refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from gemma_native.config import Config, config_from_gguf, config_from_hf
from gemma_native.errors import FormatError

GEMMA_2B: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "hidden_act": "gelu",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
GEMMA2_27B: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 144,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "eos_token_id": [1, 107],
}
GEMMA3_270M: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "_sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
    "eos_token_id": 1,
}
GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
ALL = {"gemma": GEMMA_2B, "gemma2": GEMMA2_27B, "gemma3": GEMMA3_270M, "multimodal": GEMMA3_4B}


def hf(data: dict[str, Any], generation: dict[str, Any] | None = None, **changes: Any) -> Config:
    """config_from_hf with some fields of config.json changed (of text_config where there is one)."""
    data = json.loads(json.dumps(data))
    (data["text_config"] if "text_config" in data else data).update(changes)
    return config_from_hf(data, "dir/config.json", generation)


def test_gemma1() -> None:
    c = hf(GEMMA_2B)
    assert (c.architecture, c.vocab_size, c.hidden_size, c.intermediate_size) == ("gemma", 256000, 2048, 16384)
    assert (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.context_length) == (18, 8, 1, 256, 8192)
    assert c.query_scale == 1 / 16 and c.norm_offset == 1.0 and c.rms_norm_eps == 1e-6
    assert (c.attn_softcap, c.final_softcap, c.sliding_window, c.sliding_layers) == (0, 0, 0, ())
    assert (c.rope_base, c.rope_base_local, c.rope_scale) == (10000, 10000, 1)
    assert (c.qk_norm, c.post_norms, c.bos_token_id, c.eos_token_ids) == (False, False, 2, (1,))


def test_gemma2() -> None:
    c = hf(GEMMA2_27B)
    assert c.query_scale == 1 / 12 and (c.attn_softcap, c.final_softcap) == (50, 30)
    assert c.sliding_window == 4096 and c.sliding_layers == (True, False) * 23
    assert (c.qk_norm, c.post_norms, c.eos_token_ids) == (False, True, (1, 107))
    assert (c.rope_base, c.rope_base_local) == (10000, 10000)
    silent = {k: v for k, v in GEMMA2_27B.items() if not k.endswith("softcapping") and k != "sliding_window"}
    assert hf(silent) == c  # what transformers assumes
    assert hf(silent, attn_logit_softcapping=None).attn_softcap == 0  # null, however, means none
    assert hf(GEMMA2_27B, rope_parameters={"rope_theta": 5e4}).rope_base_local == 5e4


def test_gemma3_both_dialects() -> None:
    c = hf(GEMMA3_270M)
    assert c.sliding_layers == tuple(i % 6 != 5 for i in range(18)) and c.sliding_window == 512
    assert (c.rope_base, c.rope_base_local, c.rope_scale) == (1e6, 1e4, 1)
    assert (c.qk_norm, c.post_norms, c.attn_softcap, c.final_softcap) == (True, True, 0, 0)
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling", "_sliding_window_pattern")
    new = {k: v for k, v in GEMMA3_270M.items() if k not in old}
    new["layer_types"] = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]
    new["rope_parameters"] = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert hf(new) == c
    new["rope_parameters"]["full_attention"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0}
    new["rope_parameters"]["sliding_attention"]["rope_theta"] = 2e4
    assert (hf(new).rope_base, hf(new).rope_base_local, hf(new).rope_scale) == (5e5, 2e4, 8)
    del new["rope_parameters"]["full_attention"]["rope_theta"]
    assert hf(new, rope_theta=7e5).rope_base == 7e5  # the other dialect's field, then the default
    assert hf(new).rope_base == 1e6


def test_gemma3_scaling_in_older_spelling() -> None:
    assert hf(GEMMA3_270M, rope_scaling={"type": "linear", "factor": 4}).rope_scale == 4
    assert hf(GEMMA3_270M, rope_scaling={"rope_type": "default"}).rope_scale == 1
    both = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert hf(GEMMA3_270M, rope_parameters=both, rope_scaling={"rope_type": "linear", "factor": 8}).rope_scale == 8


def test_multimodal_defaults() -> None:
    c = hf(GEMMA3_4B)
    assert (c.architecture, c.vocab_size, c.hidden_size, c.intermediate_size) == ("gemma3", 262208, 2560, 10240)
    assert (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.context_length) == (34, 8, 4, 256, 131072)
    assert c.query_scale == 1 / 16 and c.sliding_window == 1024
    assert c.sliding_layers == tuple(i % 6 != 5 for i in range(34))
    assert (c.rope_base, c.rope_base_local, c.rope_scale) == (1e6, 1e4, 8)
    assert c.eos_token_ids == (1, 106)  # named outside text_config
    empty = config_from_hf({"model_type": "gemma3", "text_config": {}}, "x")
    assert (empty.hidden_size, empty.num_layers, empty.sliding_window) == (2304, 26, 4096)
    c = hf(GEMMA3_4B, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168)
    assert c.query_scale == 168**-0.5


def test_layer_types_win_over_any_pattern() -> None:
    types = ["full_attention"] * 17 + ["sliding_attention"]
    c = hf(GEMMA3_270M, layer_types=types, sliding_window_pattern=2)
    assert c.sliding_layers == (False,) * 17 + (True,)
    assert hf(GEMMA3_270M, sliding_window_pattern=3).sliding_layers == tuple(i % 3 != 2 for i in range(18))
    none = hf(GEMMA3_270M, layer_types=["full_attention"] * 18)
    assert none.sliding_window == 0 and not any(none.sliding_layers)


def test_stop_tokens_of_every_source() -> None:
    assert hf(GEMMA_2B, generation={"eos_token_id": [1, 107]}).eos_token_ids == (1, 107)
    assert hf(GEMMA2_27B, generation={"eos_token_id": 5}).eos_token_ids == (1, 107, 5)
    assert hf(GEMMA_2B, eos_token_id=None).eos_token_ids == (1,)
    for bad in (-1, True, "1", 1.0, [1, [2]], [None, 1 << 40], {"a": 1}, list(range(2000))):
        with pytest.raises(FormatError, match="config.json: eos_token_id"):
            hf(GEMMA_2B, eos_token_id=bad)
        with pytest.raises(FormatError, match="eos_token_id"):
            hf(GEMMA_2B, generation={"eos_token_id": bad})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"hidden_activation": ["gelu"]}, "hidden_activation"),
        ({"hidden_activation": {}, "hidden_act": 3}, "hidden_activation is 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling.rope_type is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scale is 0"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 8}}, "rope_type must be a string"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention must be an object"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8}}},
            "rope_parameters.sliding_attention.factor scales sliding layers",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["full_attention"] * 17 + ["chunked_attention"]}, "layer_types holds 'chunked_attention'"),
        ({"layer_types": [["full_attention"]] * 18}, "layer_types holds"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 query heads cannot share 2"),
        ({"head_dim": 63}, "head_dim is 63"),
    ],
)
def test_refused_features(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError) as error:
        hf(GEMMA3_270M, **changes)
    assert str(error.value).startswith("dir/config.json: ") and named in str(error.value)


def test_refused_architectures() -> None:
    for kind in ("llama", "gemma3n", "gemma3n_text", "paligemma", "recurrent_gemma", "t5gemma", None, 3, ["gemma"], {}):
        with pytest.raises(FormatError, match="model_type"):
            config_from_hf({**GEMMA_2B, "model_type": kind}, "x")
    with pytest.raises(FormatError, match="text_config.model_type is 'llama'"):
        hf(GEMMA3_4B, model_type="llama")
    with pytest.raises(FormatError, match="text_config must be an object"):
        config_from_hf({"model_type": "gemma3", "text_config": [1]}, "x")


ABSURD: list[Any] = [
    0,
    -1,
    1 << 40,
    10**400,
    -(10**400),
    1.5,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "8",
    [8],
    {"a": 8},
]
INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window", "sliding_window_pattern",
)  # fmt: skip
NUMBERS = (
    "query_pre_attn_scalar", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta",
    "rope_local_base_freq",
)  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", ABSURD, ids=lambda v: f"{v!r:.12}")
def test_absurd_values_of_every_field(kind: str, value: Any) -> None:
    fields = INTEGERS + NUMBERS + ("bos_token_id",)
    for name in fields:
        try:
            # Not through JSON: NaN and integers of 400 digits are what json.loads makes of such files, too.
            data = json.loads(json.dumps(ALL[kind]))
            data.get("text_config", data)[name] = value
            config = config_from_hf(data, "config.json")
        except FormatError as error:
            assert str(error).startswith("config.json: "), error
            assert len(str(error)) < 400
            continue
        assert accepts(kind, name, value), f"{kind}: {name} = {value!r:.30} was accepted"
        for number in (config.query_scale, config.rope_base, config.rope_scale, config.rms_norm_eps):
            assert math.isfinite(number)


def accepts(kind: str, name: str, value: Any) -> bool:
    """Whether a value of ABSURD means something for a field, or the field means nothing for this generation."""
    if name.startswith(("sliding", "query")) and kind == "gemma":
        return True
    if name == "rope_local_base_freq" and kind in ("gemma", "gemma2"):
        return True
    if name == "sliding_window_pattern" and not isinstance(value, bool) and isinstance(value, int) and value > 0:
        return True  # more than there are layers: all slide
    zero = isinstance(value, int) and not isinstance(value, bool) and value == 0
    if name == "bos_token_id" or name.endswith("softcapping") or name == "rms_norm_eps":
        return zero or (value == 1.5 and name.endswith("softcapping"))
    return name in NUMBERS and not isinstance(value, bool) and value in (1.5, 1 << 40)


def test_missing_and_null_fields() -> None:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        with pytest.raises(FormatError, match=f"x: {name} is missing"):
            config_from_hf({k: v for k, v in GEMMA_2B.items() if k != name}, "x")
        with pytest.raises(FormatError, match=f"x: {name} is missing"):
            config_from_hf({**GEMMA_2B, name: None}, "x")


def test_json_round_trip() -> None:
    for data in ALL.values():
        c = hf(data)
        assert Config.from_json(c.to_json(), "x") == c


@pytest.mark.parametrize("value", [*ABSURD, None], ids=lambda v: f"{v!r:.12}")
def test_absurd_packed_configs(value: Any) -> None:
    good = json.loads(hf(GEMMA3_270M).to_json())
    for name in good:
        try:
            c = Config.from_json(json.dumps({**good, name: value}), "file")
        except FormatError as error:
            assert str(error).startswith("file: ")
            continue
        # The few that mean something: a flag, an offset or cap of none, odd but positive numbers.
        assert (
            isinstance(value, bool)
            or value in (0, 1.5, 1 << 40)
            or (isinstance(value, list) and name == "eos_token_ids")
        ), (
            name,
            c,
        )


def test_malformed_packed_configs() -> None:
    good = json.loads(hf(GEMMA3_270M).to_json())
    deep = "[" * 100_000
    for text in ("", "{", "[]", "null", "3", "\x00", '{"a":' + deep, "1" * 5000):
        with pytest.raises(FormatError, match="^file: "):
            Config.from_json(text, "file")
    for change, named in (
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"architecture": "llama"}, "architecture is 'llama'"),
        ({"architecture": ["gemma"]}, "architecture"),
        ({"sliding_layers": [True]}, "1 of 18 layers"),
        ({"sliding_layers": ["yes"] * 18}, "sliding_layers"),
        ({"sliding_layers": "yes"}, "sliding_layers must be a list"),
        ({"sliding_window": 0}, "no sliding_window"),
        ({"qk_norm": "yes"}, "qk_norm"),
        ({"post_norms": 1}, "post_norms"),
        ({"eos_token_ids": [True]}, "eos token ids"),
        ({"vocab_size": 8.0}, "vocab_size"),
    ):
        with pytest.raises(FormatError, match=named):
            Config.from_json(json.dumps({**good, **change}), "file")
    del good["head_dim"]
    with pytest.raises(FormatError, match="head_dim"):
        Config.from_json(json.dumps(good), "file")


# --- GGUF ---


def metadata(arch: str = "gemma3", layers: int = 18, **changes: Any) -> dict[str, Any]:
    values = {
        "block_count": layers,
        "embedding_length": 640,
        "feed_forward_length": 2048,
        "context_length": 32768,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 512,
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    out = {f"{arch}.{k}": v for k, v in values.items() if v is not None}
    return {"general.architecture": arch, "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, **out}


def from_gguf(*args: Any, **changes: Any) -> Config:
    return config_from_gguf(metadata(*args, **changes), 262144, "file.gguf")


def test_gguf_gemma3() -> None:
    c = from_gguf()
    assert (c.architecture, c.vocab_size, c.hidden_size, c.intermediate_size) == ("gemma3", 262144, 640, 2048)
    assert (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.context_length) == (18, 4, 1, 256, 32768)
    assert c.norm_offset == 0.0 and c.query_scale == 1 / 16  # GGUF has the 1 added already
    assert c.sliding_window == 512 and c.sliding_layers == tuple(i % 6 != 5 for i in range(18))
    assert (c.rope_base, c.rope_base_local, c.rope_scale) == (1e6, 1e4, 1)
    assert (c.qk_norm, c.post_norms, c.attn_softcap, c.final_softcap) == (True, True, 0, 0)


def test_gguf_query_scales_of_the_27b() -> None:
    assert from_gguf("gemma2", 46, attention__key_length=128, attention__value_length=128).query_scale == 1 / 12
    assert from_gguf("gemma2", 42).query_scale == 1 / 16
    assert from_gguf("gemma3", 62, attention__key_length=128, attention__value_length=128).query_scale == 168**-0.5
    assert from_gguf("gemma3", 48).query_scale == 1 / 16
    assert from_gguf("gemma", 62).query_scale == 1 / 16


def test_gguf_defaults() -> None:
    c = from_gguf("gemma2", attention__sliding_window=None)
    assert (c.attn_softcap, c.final_softcap, c.sliding_window, c.rope_base, c.rope_base_local) == (
        50,
        30,
        4096,
        1e4,
        1e4,
    )
    assert c.sliding_layers == (True, False) * 9
    assert from_gguf("gemma2", attn_logit_softcapping=0.0).attn_softcap == 0
    c = from_gguf("gemma", attention__sliding_window=None)
    assert (c.attn_softcap, c.sliding_window, c.rope_base, c.sliding_layers) == (0, 0, 1e4, ())
    assert from_gguf(attention__sliding_window=None).sliding_layers == ()
    c = from_gguf("gemma", attention__key_length=None, attention__value_length=None)
    assert c.head_dim == 160
    assert from_gguf(attention__head_count_kv=None).num_kv_heads == 4
    c = from_gguf(rope__freq_base=5e5, rope__freq_base_swa=2e4, rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert (c.rope_base, c.rope_base_local, c.rope_scale) == (5e5, 2e4, 8)


def test_gguf_rope_scaling_in_every_spelling() -> None:
    assert from_gguf(rope__scaling__type="linear", rope__scaling__factor=8.0).rope_scale == 8
    assert from_gguf(rope__scaling__factor=8.0).rope_scale == 8  # linear is what no type means
    assert from_gguf(rope__scale_linear=4.0).rope_scale == 4
    assert from_gguf(rope__scale_linear=4.0, rope__scaling__factor=8.0).rope_scale == 8
    assert from_gguf(rope__scaling__type="none", rope__scaling__factor=8.0).rope_scale == 1
    assert from_gguf().rope_scale == 1


def test_gguf_sliding_patterns() -> None:
    key = "attention__sliding_window_pattern"
    assert from_gguf(**{key: 3}).sliding_layers == tuple(i % 3 != 2 for i in range(18))
    flags = [i % 4 != 0 for i in range(18)]
    for array in (flags, np.array(flags), np.array(flags, np.uint32), np.array(flags, np.int32)):
        assert from_gguf(**{key: array}).sliding_layers == tuple(flags)
    none = from_gguf(**{key: np.zeros(18, bool)})
    assert none.sliding_window == 0 and not any(none.sliding_layers)
    for bad in (0, -1, True, "6", 1.5, np.ones(17, bool), np.full(18, 2), np.full(18, math.nan), [b"1"] * 18):
        with pytest.raises(FormatError, match="^file.gguf: gemma3.attention.sliding_window_pattern"):
            from_gguf(**{key: bad})


def test_gguf_refusals() -> None:
    for kind in ("llama", "gemma3n", None, 3, np.array([1, 2]), [b"gemma"], True):
        with pytest.raises(FormatError, match="^f: general.architecture"):
            config_from_gguf({**metadata(), "general.architecture": kind}, 8, "f")
    for bad in ("yarn", 3, np.array([1, 2]), [b"linear"]):
        with pytest.raises(FormatError, match="gemma3.rope.scaling.type"):
            from_gguf(rope__scaling__type=bad)
    with pytest.raises(FormatError, match="value_length differs"):
        from_gguf(attention__value_length=128)
    for name in ("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count"):
        with pytest.raises(FormatError, match=f"gemma3.{name} is missing"):
            from_gguf(**{name: None})
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.bos_token_id"):
        for bad in (-1, True, "x", 1.5, np.array([1]), 1 << 40):
            with pytest.raises(FormatError, match="^f: (eos|bos|tokenizer.ggml.bos)_token_id"):
                config_from_gguf({**metadata(), key: bad}, 8, "f")
    assert config_from_gguf({**metadata(), "tokenizer.ggml.eot_token_id": 106}, 8, "f").eos_token_ids == (1, 106)


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("value", [*ABSURD, np.array([1, 2]), [b"a"]], ids=lambda v: f"{v!r:.12}")
def test_gguf_absurd_values_of_every_field(arch: str, value: Any) -> None:
    names = [k.split(".", 1)[1] for k in metadata(arch) if k.startswith(arch + ".")]
    names += [
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.factor",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ]
    for name in names:
        changes = {name: value, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0} | {name: value}
        try:
            c = from_gguf(arch, **changes)
        except FormatError as error:
            assert str(error).startswith("file.gguf: ")
            continue
        unused = (arch == "gemma" and "sliding" in name) or (arch != "gemma3" and name == "rope.freq_base_swa")
        meant = not isinstance(value, (bool, np.ndarray)) and (
            value in (0, 1.5) or (value == 1 << 40 and "freq_base" in name)
        )
        assert unused or meant, f"{name} = {value!r:.30} was accepted"
        assert math.isfinite(c.query_scale)

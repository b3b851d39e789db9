"""Text to token ids and back, on top of SentencePiece.

Every source (a `tokenizer.model`, the vocabulary of a GGUF file, a Hugging Face `tokenizer.json`) is first turned into
one SentencePiece model in memory, in which every control piece is typed CONTROL. SentencePiece never produces a CONTROL
piece from text, so nothing that a user types can become a control token; `encode(..., special=True)` alone maps written
control strings to their ids.

It refuses (with FormatError) vocabularies that are not whole: duplicate or empty pieces, invalid UTF-8, scores that are
not numbers, a partial set of byte pieces, no or several unknown pieces, normalisers that it cannot express.
"""

from __future__ import annotations

import atexit
import codecs
import json
import operator
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's and GGUF's numbers
SPACE = "\u2581"  # how a space is spelled inside a piece
_SPACE = SPACE.encode()
MAX_FILE_BYTES = 1 << 28  # Gemma's largest tokenizer.json has 33 MB

# The HTML tags of Gemma's vocabularies are ordinary text that matches literally; every other <...> or [...] piece that is
# not plain BPE output is a marker.
_TAGS = (
    "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b i u s sub sup code "
    "a html body img span bbox ul ol li div iframe footer p br hr pre"
).split()
_HTML = frozenset(f"<{slash}{tag}>".encode() for tag in _TAGS for slash in ("", "/"))
_RESERVED = re.compile(
    rb"<(pad|eos|bos|unk|mask|2mass|unused\d+|start_of_turn|end_of_turn|(start|end)_of_(image|audio)"
    rb"|image_soft_token|\|[^|]+\|)>|\[(@BOS@|multimodal)\]"
)


def _count_errors(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for every byte that is not UTF-8, as SentencePiece decodes."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("gemma_native.each_byte", _count_errors)
_Utf8 = codecs.getincrementaldecoder("utf-8")


# --- protobuf wire format: the few fields of sentencepiece_model.proto that matter ---


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise FormatError("SentencePiece model: a number runs past the end of the file")
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterable[tuple[int, int | bytes]]:
    """(field number, value) of one message; values are ints, or bytes for strings, messages and floats."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise FormatError(f"SentencePiece model: wire type {wire} at byte {at} (not a SentencePiece model?)")
        if size > end - at:
            raise FormatError(
                f"SentencePiece model: field {key >> 3} wants {size} bytes, {end - at} are left (cut short?)"
            )
        yield key >> 3, data[at : at + size]
        at += size


def _put_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _put(field: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _put_varint(field << 3) + _put_varint(value)
    return _put_varint(field << 3 | 2) + _put_varint(len(value)) + value


class _Calls:
    """Calls under way, for which the interpreter's end waits a while.

    SentencePiece works without the GIL. When the interpreter has ended, a Python before 3.14 unwinds the stack of a daemon thread
    that asks for it again, and C++ answers by ending the process with an error.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """For a forked child, which has none of the threads."""
        self._changed = threading.Condition()
        self._inside = 0
        self._ended = False

    def __enter__(self) -> None:
        with self._changed:
            # The thread that ends the interpreter may still call; for others the process most likely ends here. If it waits for them
            # instead, in a handler of its own, they go on.
            ending = threading.current_thread() is threading.main_thread()
            if not self._changed.wait_for(lambda: not self._ended or ending, timeout=2):
                self._ended = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._inside <= 0, timeout=2)


_calls = _Calls()
atexit.register(_calls.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_calls.forget)


class _Guarded:
    """A SentencePieceProcessor whose methods are such calls."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._processor, name)

        def call(*arguments: Any) -> Any:
            with _calls:
                return method(*arguments)

        return call


def _emit_pieces(pieces: Sequence[bytes], scores: bytes, types: Sequence[int]) -> list[bytes]:
    """ModelProto.pieces (field 1), each {1: piece, 2: float score, 3: type}. This loop is the cost of loading."""
    out = []
    at = 0
    for piece, kind in zip(pieces, types, strict=True):
        size = len(piece)
        if size < 116:
            out.append(b"\n%c\n%c%b\x15%b\x18%c" % (size + 9, size, piece, scores[at : at + 4], kind))
        else:
            out.append(_put(1, _put(1, piece) + b"\x15" + scores[at : at + 4] + _put(3, kind)))
        at += 4
    return out


def _read_piece(message: bytes, index: int) -> tuple[bytes, bytes, int]:
    found = dict(_fields(message))
    piece, score, kind = found.get(1, b""), found.get(2, b"\0\0\0\0"), found.get(3, NORMAL)
    if not isinstance(piece, bytes) or not isinstance(score, bytes) or not isinstance(kind, int) or len(score) != 4:
        raise FormatError(f"SentencePiece model: piece {index} has fields of the wrong kind")
    return piece, score, kind


def _read_proto(data: bytes) -> tuple[list[bytes], bytes, list[int], bytes, bytes]:
    """(pieces, little-endian float32 scores, types, trainer_spec, normalizer_spec) of a serialised ModelProto."""
    pieces: list[bytes] = []
    scores: list[bytes] = []
    types: list[int] = []
    trainer = normalizer = b""
    at, end = 0, len(data)
    while at + 1 < end and data[at] == 10 and data[at + 1] < 128:  # a short piece; 256,000 of them, so by hand
        begin = at + 2
        at = begin + data[at + 1]
        if at > end:
            raise FormatError(f"SentencePiece model: piece {len(pieces)} runs past the end of the file")
        # As SentencePiece itself writes it: 0A length piece, 15 score, then 18 type unless NORMAL.
        size = at - begin
        score = begin + 2 + data[begin + 1] if size > 7 and data[begin] == 10 else at
        rest = at - score
        if rest == 5 and data[score] == 0x15:
            types.append(NORMAL)
        elif rest == 7 and data[score] == 0x15 and data[score + 5] == 0x18:
            types.append(data[score + 6])
        else:
            piece, packed, kind = _read_piece(data[begin:at], len(pieces))
            pieces.append(piece)
            scores.append(packed)
            types.append(kind)
            continue
        pieces.append(data[begin + 2 : score])
        scores.append(data[score + 1 : score + 5])
    for field, message in _fields(data[at:]):
        if field > 3:
            continue
        if not isinstance(message, bytes):
            raise FormatError(f"SentencePiece model: field {field} is not a message")
        if field == 1:
            piece, packed, kind = _read_piece(message, len(pieces))
            pieces.append(piece)
            scores.append(packed)
            types.append(kind)
        elif field == 2:
            trainer += message
        else:
            normalizer += message
    return pieces, b"".join(scores), types, trainer, normalizer


def _check_and_retype(
    pieces: list[bytes], scores: bytes, types: list[int], control_ids: Iterable[int]
) -> dict[str, int]:
    """Checks a vocabulary, mends types in place and returns {written form: id} of its control pieces."""
    count = len(pieces)
    if not count:
        raise FormatError("vocabulary: it has no pieces")
    if not (len(types) == count and len(scores) == 4 * count):
        raise FormatError(f"vocabulary: {count} pieces, {len(scores) // 4} scores, {len(types)} types")
    bad = [i for i, kind in enumerate(types) if not NORMAL <= kind <= BYTE]
    if bad:
        raise FormatError(f"vocabulary: piece {bad[0]} has type {types[bad[0]]}, not one of 1 to 6")
    finite = np.isfinite(np.frombuffer(scores, "<f4"))
    if not finite.all():
        raise FormatError(f"vocabulary: the score of piece {int(finite.argmin())} is not a finite number")
    try:
        b"\n".join(pieces).decode()  # the separator is ASCII, so one bad piece cannot hide in another
    except UnicodeDecodeError:
        for i, piece in enumerate(pieces):
            try:
                piece.decode()
            except UnicodeDecodeError:
                raise FormatError(f"vocabulary: piece {i} is not valid UTF-8: {piece[:40]!r}") from None

    if UNKNOWN not in types and b"<unk>" in pieces:  # GGUF files type it CONTROL
        types[pieces.index(b"<unk>")] = UNKNOWN
    unknown = [i for i, kind in enumerate(types) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise FormatError(f"vocabulary: it needs one unknown piece (such as <unk>) and has {len(unknown)}")

    controls = {i for i in control_ids if types[i] != UNKNOWN}
    for i, piece in enumerate(pieces):
        kind = types[i]
        if kind == USER_DEFINED:
            marker = piece[:1] + piece[-1:] in (b"<>", b"[]") and len(piece) > 2 and piece not in _HTML
            if marker or _RESERVED.fullmatch(piece):
                controls.add(i)
            elif b" " in piece:  # GGUF files spell runs of spaces with real spaces, which text never contains by then
                pieces[i] = piece.replace(b" ", _SPACE)
        elif kind == CONTROL or (kind == NORMAL and piece[:1] in b"<[" and _RESERVED.fullmatch(piece)):
            controls.add(i)
    for i in controls:
        types[i] = CONTROL
        if len(pieces[i].decode()) < 2:  # SentencePiece would give this id for the typed character
            raise FormatError(
                f"vocabulary: control piece {i} is {pieces[i]!r}; a single character cannot be told from text"
            )

    byte_ids = [i for i, kind in enumerate(types) if kind == BYTE]
    if byte_ids and {pieces[i] for i in byte_ids} != {b"<0x%02X>" % b for b in range(256)}:
        raise FormatError(f"vocabulary: {len(byte_ids)} byte pieces; they must be <0x00> to <0xFF>, all 256, or none")
    if len(set(pieces)) != count:
        seen: dict[bytes, int] = {}
        for i, piece in enumerate(pieces):
            if piece in seen:
                raise FormatError(f"vocabulary: pieces {seen[piece]} and {i} are both {piece[:40]!r}")
            seen[piece] = i
    if b"" in pieces:
        raise FormatError(f"vocabulary: piece {pieces.index(b'')} is empty")
    return {pieces[i].decode(): i for i in sorted(controls) + unknown}


class Tokenizer:
    """A vocabulary and its two directions, `encode` and `decode`.

    Make one with `from_file`, `from_sentencepiece`, `from_pieces` or `from_json`. Immutable, and safe to share
    between threads. Attributes: `vocab_size` (pieces), `bos_id`, `eos_id`, `unk_id` (int, or None where there is none).
    """

    def __init__(
        self,
        pieces: list[bytes],
        scores: bytes,
        types: list[int],
        trainer: bytes,
        normalizer: bytes,
        bos: int | None = None,
        eos: int | None = None,
    ) -> None:
        """Raw parts of a SentencePiece model (serialised specs); use the named constructors instead."""
        for name, number in (("bos", bos), ("eos", eos)):
            if number is not None and not 0 <= number < len(pieces):
                raise FormatError(f"vocabulary: {name} id {number} is outside its {len(pieces)} pieces")
        self._control = _check_and_retype(pieces, scores, types, [i for i in (bos, eos) if i is not None])
        trainer += _put(35, int(BYTE in types))  # byte_fallback; in a repeated scalar field the last value counts
        for field, number in ((46, bos), (47, eos), (45, types.index(UNKNOWN))):
            if number is not None:
                trainer += _put(field, pieces[number])
        parts = _emit_pieces(pieces, scores, types)
        parts += [_put(2, trainer), _put(3, normalizer)]

        from sentencepiece import SentencePieceProcessor  # here, since importing it takes longer than the whole package

        self._sp: Any = _Guarded(SentencePieceProcessor())
        try:
            self._sp.LoadFromSerializedProto(b"".join(parts))
        except (RuntimeError, OSError) as error:
            raise FormatError(f"SentencePiece refuses the vocabulary: {error}") from None
        if self._sp.vocab_size() != len(pieces):
            raise FormatError(f"SentencePiece loaded {self._sp.vocab_size()} of {len(pieces)} pieces")
        self._types = bytes(types)
        self._surfaces: dict[int, bytes | str] = {}
        self.vocab_size: int = len(pieces)
        self.unk_id: int = types.index(UNKNOWN)
        self.bos_id: int | None = self._named(bos, self._sp.bos_id(), "<bos>")
        self.eos_id: int | None = self._named(eos, self._sp.eos_id(), "<eos>")
        # Normaliser settings that decoding undoes: field 3 and 4 default to true in the format.
        flags = dict(_fields(normalizer))
        self._strip = bool(flags.get(3, 1)) or bool(flags.get(4, 1))
        firsts = "".join(sorted({text[0] for text in self._control}))
        self._starts = re.compile("[" + re.escape(firsts) + "]")
        self._lengths = sorted({len(text) for text in self._control}, reverse=True)

    def _named(self, given: int | None, own: int, name: str) -> int | None:
        if given is not None:
            return given
        return own if own >= 0 else self._control.get(name)

    # --- constructors ---

    @classmethod
    def from_sentencepiece(cls, data: bytes) -> Tokenizer:
        """From the bytes of a `tokenizer.model`. Raises FormatError."""
        pieces, scores, types, trainer, normalizer = _read_proto(bytes(data))
        kind = dict(_fields(trainer)).get(3, 1)
        if kind not in (1, 2):
            raise FormatError(f"SentencePiece model: model_type {kind!r} is neither unigram (1) nor BPE (2)")
        return cls(pieces, scores, types, trainer, normalizer)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a `tokenizer.model` or, by its suffix, a `tokenizer.json`. Raises FormatError naming the file."""
        if os.fspath(path).endswith(".json"):
            return cls.from_json(path)
        try:
            return cls.from_sentencepiece(_read_file(path))
        except FormatError as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_pieces(
        cls,
        tokens: Sequence[str | bytes],
        scores: Any,
        types: Sequence[int],
        bos: int | None = None,
        eos: int | None = None,
        add_space_prefix: bool = False,
    ) -> Tokenizer:
        """From parallel lists: pieces, float scores (any array-like), SentencePiece type numbers. A BPE model with the
        identity normaliser, as GGUF files carry it. Raises FormatError."""
        try:
            pieces = [token if isinstance(token, bytes) else token.encode() for token in tokens]
        except (UnicodeEncodeError, AttributeError):
            raise FormatError("vocabulary: a piece is not a UTF-8 string") from None
        try:
            packed = np.asarray(scores, dtype="<f4").tobytes()
            kinds = [int(kind) for kind in types]
        except (TypeError, ValueError, OverflowError):
            raise FormatError("vocabulary: scores must be numbers and types integers") from None
        trainer = _put(3, 2) + _put(4, len(pieces))
        normalizer = _put(1, b"identity") + _put(3, int(add_space_prefix)) + _put(4, 0) + _put(5, 1)
        return cls(pieces, packed, kinds, trainer, normalizer, bos, eos)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a Hugging Face `tokenizer.json` (BPE with byte fallback, as Gemma's). The order of its merges becomes
        the scores. Raises FormatError naming the file and what it cannot express (byte-level BPE, other normalisers)."""
        try:
            return cls.from_pieces(**_pieces_from_json(_read_file(path)))
        except FormatError as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_sentencepiece, (self.proto,)

    # --- use ---

    @property
    def proto(self) -> bytes:
        """The serialised SentencePiece model, control pieces retyped; `from_sentencepiece` reads it back."""
        return bytes(self._sp.serialized_model_proto())

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text. `bos` puts the begin-of-sequence token in front, once. `special=True` alone maps control
        strings written in the text, such as `<start_of_turn>`, to their ids. Unpaired surrogates become U+FFFD."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids: list[int] = []
        if special:
            for part in self._split(text):
                ids += [part] if isinstance(part, int) else self._sp.encode(part)
        elif text:
            ids = list(self._sp.encode(text))
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _split(self, text: str) -> list[str | int]:
        """The text cut at its control strings (longest match), which are replaced by their ids."""
        parts: list[str | int] = []
        done = at = 0
        while match := self._starts.search(text, at):
            at = match.start()
            for length in self._lengths:
                token = self._control.get(text[at : at + length])
                if token is not None and at + length <= len(text):
                    if done < at:
                        parts.append(text[done:at])
                    parts.append(token)
                    done = at = at + length
                    break
            else:
                at += 1
        if done < len(text):
            parts.append(text[done:])
        return parts

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Control tokens give nothing; bytes that are not UTF-8 give U+FFFD, one each.
        Raises ValueError for an id outside the vocabulary, TypeError for what is no integer."""
        out = Detokenizer(self, start=True)
        texts = [out.push(self._inside(token)) for token in ids]
        texts.append(out.flush())
        return "".join(texts)

    def piece(self, token: int) -> str:
        """How the vocabulary spells a token (spaces as U+2581, bytes as <0x41>). Raises ValueError outside it."""
        return str(self._sp.id_to_piece(self._inside(token)))

    def _inside(self, token: int) -> int:
        token = operator.index(token)
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size} pieces")
        return token

    def id(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary spells it, or None."""
        token = int(self._sp.piece_to_id(piece))
        return token if token != self.unk_id or piece == self.piece(token) else None

    def is_control(self, token: int) -> bool:
        """True for tokens that stand for no text: beginning, end, turns, unused and the like."""
        return 0 <= token < self.vocab_size and self._types[token] == CONTROL

    def surface(self, token: int) -> bytes | str:
        """What a token adds to a text: a str, or one byte (bytes) of a character for a byte-fallback piece. Empty for
        control tokens and for ids past the vocabulary (a model may have more embedding rows than pieces)."""
        found = self._surfaces.get(token)
        if found is None:
            kind = self._types[token] if 0 <= token < self.vocab_size else CONTROL
            if kind == CONTROL:
                found = ""
            elif kind == UNKNOWN:
                found = " \u2047 "
            else:
                piece = str(self._sp.id_to_piece(token))
                found = bytes([int(piece[3:5], 16)]) if kind == BYTE else piece.replace(SPACE, " ")
            self._surfaces[token] = found
        return found

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} pieces)"


class Detokenizer:
    """Token ids in, whole UTF-8 characters out: `push` one id at a time, then `flush`. The pieces joined are the text.

    `start=False` for the continuation of a text: then the first space stays even in vocabularies with a space prefix.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool = False) -> None:
        self._tokenizer = tokenizer
        self._bytes = _Utf8("gemma_native.each_byte")
        self._strip = start and tokenizer._strip

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        surface = self._tokenizer.surface(token)
        if isinstance(surface, bytes):
            self._strip = False
            return self._bytes.decode(surface)
        if surface and self._strip:
            self._strip = False
            surface = surface.removeprefix(" ")
        return self._bytes.decode(b"", True) + surface

    def flush(self) -> str:
        """What an unfinished character leaves behind: U+FFFD for each of its bytes."""
        return self._bytes.decode(b"", True)


def count_pieces(path: str | os.PathLike[str]) -> int:
    """How many pieces a `tokenizer.model` has, without building it. Raises FormatError."""
    return sum(field == 1 for field, _ in _fields(_read_file(path)))


def _read_file(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"larger than {MAX_FILE_BYTES >> 20} MiB, which no tokenizer is")
    return data


def _pieces_from_json(data: bytes) -> dict[str, Any]:
    """Arguments of `Tokenizer.from_pieces` from the bytes of a Hugging Face tokenizer.json."""
    try:
        root = json.loads(data)
        return _pieces_from_hf(root)
    except FormatError:
        raise
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError(f"a field is missing or of the wrong kind: {error!r}") from None


def _space_prefix(root: dict[str, Any]) -> bool:
    """Whether a space is put before the text; refuses normalisers and splitters that SentencePiece cannot express."""
    prefix = spaces = False
    for stage in ("normalizer", "pre_tokenizer"):
        step = root.get(stage)
        if step is None:
            continue
        steps = step.get("normalizers", step.get("pretokenizers")) if step["type"] == "Sequence" else [step]
        for step in steps:
            kind = step["type"]
            if kind == "Prepend" and step["prepend"] == SPACE:
                prefix = True
            elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
                spaces = True
            elif kind == "Metaspace" and step.get("replacement", SPACE) == SPACE:
                spaces = True
                prefix = (
                    prefix or step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
                )
            elif kind == "Split" and step["pattern"] in ({"String": " "}, {"String": SPACE}):
                pass  # Gemma's: after the replacement there is no space left to split at
            else:
                raise FormatError(f"{stage} {kind} is not one of Gemma's (give tokenizer.model instead)")
    if not spaces:
        raise FormatError("normalizer: nothing turns spaces into U+2581, so it is not a SentencePiece vocabulary")
    return bool(prefix)


def _pieces_from_hf(root: dict[str, Any]) -> dict[str, Any]:
    model = root["model"]
    if model.get("type", "BPE") != "BPE":
        raise FormatError(f"model.type {model.get('type')!r} is not BPE")
    prefix = _space_prefix(root)
    ids: dict[str, int] = dict(model["vocab"])
    added = {}
    for entry in root.get("added_tokens") or []:
        added[int(entry["id"])] = (str(entry["content"]), bool(entry.get("special", False)))
        ids.setdefault(str(entry["content"]), int(entry["id"]))
    tokens = [""] * len(ids)
    for text, number in ids.items():
        if not isinstance(number, int) or not 0 <= number < len(tokens) or tokens[number]:
            raise FormatError(
                f"vocabulary: id {number!r} of {text[:40]!r} is used twice or leaves a gap among {len(ids)}"
            )
        tokens[number] = text

    scores = np.full(len(tokens), -float(len(model["merges"]) + 1), np.float32)
    types = [NORMAL] * len(tokens)
    done = np.zeros(len(tokens), bool)
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) and merge.count(" ") == 1 else tuple(merge)
        merged = ids.get(left + right)
        if merged is None or left not in ids or right not in ids:
            raise FormatError(f"merges[{rank}]: {left[:40]!r} + {right[:40]!r} is not made of pieces of the vocabulary")
        if not done[merged]:
            done[merged] = True
            scores[merged] = -float(rank)
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    for number, text in enumerate(tokens):
        if byte.fullmatch(text):
            types[number] = BYTE
    for number, (text, special) in added.items():
        if number >= len(tokens) or tokens[number] != text:
            raise FormatError(f"added_tokens: id {number} is {text[:40]!r}, the vocabulary says otherwise")
        types[number] = CONTROL if special else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown is not None and unknown in ids:
        types[ids[unknown]] = UNKNOWN
    bos, eos = (ids.get(names[0], ids.get(names[1])) for names in (("<bos>", "<s>"), ("<eos>", "</s>")))
    return dict(tokens=tokens, scores=scores, types=types, bos=bos, eos=eos, add_space_prefix=prefix)

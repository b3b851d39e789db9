"""The GGUF reader: what the `gguf` package writes is read back, and every malformed file is a FormatError that names file and field."""

from __future__ import annotations

import gc
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_native.errors import FormatError
from gemma_native.gguf import TYPES, GgufFile

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file by the gguf package with every kind of value, and tensors of four types."""
    path = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 1 << 31)
    writer.add_int32("a.i32", -(1 << 31))
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_int64("a.i64", -(1 << 63))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_bool("a.no", False)
    writer.add_string("a.text", "grün ▁ 🦊")
    writer.add_array("a.strings", ["", "a", "▁the"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.0])
    writer.add_array("a.flags", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("matrix", rng.standard_normal((3, 64), np.float32))
    writer.add_tensor("half", rng.standard_normal(5, np.float32).astype(np.float16))
    q8 = gguf.quants.quantize(rng.standard_normal((4, 96), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("eight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_writes(written: Path) -> None:
    file = GgufFile(written)
    m = file.metadata
    assert m["general.architecture"] == "gemma3"
    assert (m["a.u8"], m["a.i8"], m["a.u16"], m["a.i16"]) == (200, -100, 60000, -30000)
    assert (m["a.u32"], m["a.i32"], m["a.u64"], m["a.i64"]) == (1 << 31, -(1 << 31), 1 << 63, -(1 << 63))
    assert (m["a.f32"], m["a.f64"], m["a.yes"], m["a.no"], m["a.text"]) == (0.5, 0.1, True, False, "grün ▁ 🦊")
    assert all(type(m[k]) is t for k, t in (("a.u8", int), ("a.f32", float), ("a.yes", bool), ("a.text", str)))
    assert m["a.strings"] == [b"", b"a", "▁the".encode()]
    assert (
        m["a.ints"].tolist() == [1, -2, 3]
        and m["a.floats"].tolist() == [0.5, -1]
        and m["a.flags"].tolist() == [True, False]
    )
    reader = gguf.GGUFReader(written)
    assert {t.name for t in reader.tensors} == set(file.tensors) == {"matrix", "half", "eight"}
    for t in reader.tensors:
        mine = file.tensors[t.name]
        assert mine.shape == tuple(int(n) for n in t.shape[::-1])
        assert mine.dtype == t.tensor_type.name and mine.nbytes == t.n_bytes and mine.offset == t.data_offset
        view = file.tensor(t.name)
        assert view.readonly and view.tobytes() == t.data.tobytes()
    assert file.tensors["eight"].shape == (4, 96)


def test_sizes_of_types_are_the_gguf_packages() -> None:
    for number, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (block, size)


def test_cut_short_anywhere(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    end = max(t.offset + t.nbytes for t in GgufFile(written).tensors.values())
    path = tmp_path / "cut.gguf"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        if cut >= end:  # only padding is missing
            GgufFile(path)
            continue
        with pytest.raises(FormatError) as error:
            GgufFile(path)
        assert str(error.value).startswith(f"{path}: "), cut


WORDS = (0, 1, 31, 32, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
CHANGE = st.tuples(st.integers(0, 1 << 16), st.integers(0, 255).map(lambda n: bytes([n])))
CHANGE |= st.tuples(st.integers(0, 1 << 16), st.sampled_from(WORDS).map(lambda n: struct.pack("<Q", n)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGE, min_size=1, max_size=6))
def test_changed_anywhere(written: Path, tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    """Bytes and whole words changed in the header: a FormatError or a file whose tensors lie inside it, in bounded memory."""
    raw = written.read_bytes()
    head = min(t.offset for t in GgufFile(written).tensors.values())
    data = bytearray(raw)
    for at, new in changes:
        at %= head
        data[at : at + len(new)] = new[: len(data) - at]
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = GgufFile(path)
        assert all(0 <= t.offset and t.offset + t.nbytes <= len(data) for t in file.tensors.values())
        assert all(len(file.tensor(name)) == t.nbytes for name, t in file.tensors.items())
    except FormatError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < len(str(path)) + 400
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20, changes


# --- files written by hand ---


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def info(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    count = len(dims) if count is None else count
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def build(
    path: Path,
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_infos: int | None = None,
    align: int = 32,
) -> Path:
    counts = (len(infos) if n_infos is None else n_infos, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    path.write_bytes(head + bytes(-len(head) % align) + data)
    return path


def refused(path: Path, *named: str) -> None:
    """Opening is a FormatError naming the file and what `named` holds, and takes no memory to speak of."""
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as error:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size * 8 + (1 << 20)
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message) < len(str(path)) + 400 and "\n" not in message
    for part in named:
        assert part in message, message


def test_hand_written_file_is_good(tmp_path: Path) -> None:
    path = build(tmp_path / "f", [key("k", U32, struct.pack("<I", 7))], [info("t", [2, 3])], bytes(range(24)))
    file = GgufFile(path)
    assert file.metadata == {"k": 7} and file.tensors["t"].shape == (3, 2)
    assert file.tensor("t").tobytes() == bytes(range(24))
    assert GgufFile(build(tmp_path / "two", version=2)).tensors == {}


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    for content in (b"", b"G", b"GGUF", b"GGUF" + bytes(19)):
        path.write_bytes(content)
        refused(path, "too few")
    refused(build(path, magic=b"GGML"), "not a GGUF file", "GGML")
    refused(build(path, magic=b"\x80\x02}q"), "not a GGUF file")
    refused(build(path, version=1), "version 1")
    refused(build(path, version=4), "version 4")
    refused(build(path, version=3 << 24), "big-endian")
    refused(build(path, version=2 << 24), "big-endian")


@pytest.mark.parametrize("count", [1, 1000, 65536, 65537, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_absurd_counts(tmp_path: Path, count: int) -> None:
    path = tmp_path / "f.gguf"
    refused(build(path, n_keys=count, align=8), "metadata key")
    refused(build(path, n_infos=count), "tensor")
    if 1 < count < 1 << 63:
        for kind in (0, U32, STRING):
            refused(build(path, [key("many", ARRAY, struct.pack("<IQ", kind, count))]), "many")
        refused(build(path, [key("many", STRING, text(b"", count))]), "many")
        refused(build(path, [text(b"", count + 24)]), "metadata key 0")
        refused(build(path, [], [text(b"", count + 24)]), "the name of tensor 0")
        refused(build(path, [], [info("t", [count], 0)]), "'t'")
        refused(build(path, [], [info("t", [1 << 32, 1 << 32, 1 << 32, count], 0)]), "'t'")


def test_string_arrays(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    tail = bytes(64)
    for strings, named in (
        ([text(b"ok"), text(b"x", 1 << 62)], "[1] is 4611686018427387904 bytes"),
        ([text(b"ok"), text(b"x", (1 << 64) - 1)], "[1]"),
    ):
        body = struct.pack("<IQ", STRING, len(strings)) + b"".join(strings)
        refused(build(path, [key("tokens", ARRAY, body)], data=tail), "metadata 'tokens'", named)
    body = struct.pack("<IQ", STRING, 3) + text(b"a" * 40)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("tokens", ARRAY, body))
    refused(path, "'tokens'", "[1] lies past the end")
    for more in range(1, 10):  # a length that only its own 8 bytes would make room for
        body = struct.pack("<IQ", STRING, 1) + text(b"abc", 3 + more)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("tokens", ARRAY, body))
        refused(path, f"'tokens'[0] is {3 + more} bytes long, but the file ends after 3")


def test_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    one = key("k", U32, struct.pack("<I", 7))
    refused(build(path, [one, one]), "metadata 'k' occurs twice")
    refused(build(path, [], [info("t", [8]), info("t", [8], 0, 32)], bytes(64)), "tensor 't' occurs twice")


def test_unknown_types(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    for kind in (13, 99, (1 << 32) - 1):
        refused(build(path, [key("k", kind, bytes(8))]), "metadata 'k'", f"unknown type {kind}")
        refused(build(path, [key("k", ARRAY, struct.pack("<IQ", kind, 1) + bytes(8))]), "'k'", f"type {kind}")
    nested = struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 1) + bytes(4)
    refused(build(path, [key("k", ARRAY, nested)]), "'k' is an array of type 9")
    deep = struct.pack("<IQ", ARRAY, 1) * 100_000
    refused(build(path, [key("k", ARRAY, deep)]), "'k' is an array of type 9")
    for kind in (4, 5, 9, 10, 11, 16, 24, 39, (1 << 32) - 1):  # Q8_1, Q2_K, Q3_K, IQ types, I8, ...
        refused(build(path, [], [info("t", [256], kind)], bytes(2048)), "tensor 't' has GGML type", "Q6_K")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    refused(build(path, [key(b"\xff\xfe", U32, bytes(4))]), "metadata key 0 is not valid UTF-8")
    refused(build(path, [key("k", STRING, text(b"\xc3("))]), "metadata 'k' is not valid UTF-8")
    refused(build(path, [], [info(b"\xed\xa0\x80", [8])], bytes(32)), "the name of tensor 0 is not valid UTF-8")
    good = build(path, [key("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))])
    assert GgufFile(good).metadata["k"] == [b"\xff"]  # pieces of a vocabulary are bytes
    refused(build(path, [key("a\nb" * 20_000, 99, b"")]), "metadata 'a\\nb")


def test_tensor_places(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    refused(build(path, [], [info("a", [8]), info("b", [8], 0, 0)], bytes(64)), "'a' and 'b' overlap")
    refused(build(path, [], [info("a", [16]), info("b", [8], 0, 32)], bytes(64)), "'a' and 'b' overlap")
    refused(build(path, [], [info("b", [8], 0, 32), info("a", [64])], bytes(256)), "'a' and 'b' overlap")
    for offset in (1, 4, 31, 33):
        refused(build(path, [], [info("a", [8], 0, offset)], bytes(128)), f"offset {offset} is not a multiple")
    for offset in (64, 1 << 20, 1 << 62, (1 << 64) - 32):
        refused(build(path, [], [info("a", [8], 0, offset)], bytes(64)), "tensor 'a' needs bytes", "cut short?")
    refused(build(path, [], [info("a", [(1 << 32) - 1] * 4)], bytes(64)), "tensor 'a' needs bytes")
    file = GgufFile(build(path, [], [info("a", [8], 0, 64), info("b", [8])], bytes(96)))  # a gap, and not in order
    assert file.tensors["a"].offset == file.tensors["b"].offset + 64


def test_tensor_shapes(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    for dims in ([0], [8, 0], [0, 8], [1 << 32], [1 << 63, 2], [(1 << 64) - 1]):
        refused(build(path, [], [info("t", dims)], bytes(64)), "tensor 't' has the absurd shape")
    for count in (0, 5, 1 << 20, (1 << 32) - 1):
        refused(build(path, [], [info("t", [1], count=count)], bytes(64)), f"tensor 't' has {count} dimensions")
    for number, (name, block, size) in TYPES.items():
        if block > 1:
            refused(build(path, [], [info("t", [block + 1], number)], bytes(4096)), f"not a multiple of {name}'s block")
            refused(build(path, [], [info("t", [block // 2, 2], number)], bytes(4096)), f"{name}'s block of {block}")
        file = GgufFile(build(path, [], [info("t", [block, 3], number)], bytes(3 * size)))
        assert (file.tensors["t"].dtype, file.tensors["t"].nbytes) == (name, 3 * size)
        refused(build(path, [], [info("t", [block, 3], number)], bytes(3 * size - 1)), "cut short?")


@pytest.mark.parametrize("value", [0, 3, 24, (1 << 20) + 1, 1 << 21, 1 << 31])
def test_absurd_alignments(tmp_path: Path, value: int) -> None:
    refused(build(tmp_path / "f", [key("general.alignment", U32, struct.pack("<I", value))]), "general.alignment")


def test_alignments(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    for kind, payload in (
        (STRING, text("32")),
        (BOOL, b"\1"),
        (F32, struct.pack("<f", 32)),
        (U64, struct.pack("<Q", 1 << 63)),
    ):
        refused(build(path, [key("general.alignment", kind, payload)]), "general.alignment")
    refused(build(path, [key("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32))]), "general.alignment")
    # So far that the data lie past the end.
    large = key("general.alignment", U32, struct.pack("<I", 1 << 20))
    refused(build(path, [large], [info("t", [8])], bytes(64)), "'t'", "cut short?")
    for align in (1, 8, 64, 4096):
        field = key("general.alignment", U32, struct.pack("<I", align))
        file = GgufFile(build(path, [field], [info("t", [8])], bytes(range(32)), align=align))
        assert file.tensor("t").tobytes() == bytes(range(32))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        GgufFile(tmp_path)


def test_large_vocabulary_costs_little(tmp_path: Path) -> None:
    """262,144 pieces: ten milliseconds here; the bound is for slow machines."""
    import time

    pieces = [f"piece{i}".encode() for i in range(262_144)]
    body = struct.pack("<IQ", STRING, len(pieces)) + b"".join(text(p) for p in pieces)
    scores = struct.pack("<IQ", F32, len(pieces)) + np.zeros(len(pieces), np.float32).tobytes()
    path = build(tmp_path / "f.gguf", [key("tokens", ARRAY, body), key("scores", ARRAY, scores)])
    begin = time.perf_counter()
    m: dict[str, Any] = GgufFile(path).metadata
    seconds = time.perf_counter() - begin
    assert m["tokens"] == pieces and m["scores"].shape == (262_144,)
    assert seconds < 2, f"{seconds:.2f} s"

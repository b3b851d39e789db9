"""The directions in which the parts may know each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
CUDA_HEADER = re.compile(r"cuda|cublas|cutlass|nvrtc|mma\.h|<cooperative_groups", re.I)
# A module may import those named beside it; errors and config at any time.
PYTHON = {
    "__main__": {"cli"},
    "cli": {"gemma", "measure", "packed", "sampling", "tokenizer", "weights"},
    "measure": {"gguf", "weights", "_native"},
    "gemma": {"checkpoint", "weights", "tokenizer", "sampling", "sequence", "speculation", "stream", "chat", "_native"},
    "chat": {"gemma", "sampling", "sequence", "stream", "_native"},
    "stream": {"sequence", "_native"},
    "sequence": {"sampling", "speculation", "tokenizer", "_native"},
    "sampling": set(),
    "speculation": set(),
    "tokenizer": set(),
    "weights": {"checkpoint", "download", "gguf", "packed", "safetensors_file", "tokenizer"},
    "packed": {"checkpoint", "gguf", "safetensors_file", "tokenizer"},
    "download": {"checkpoint"},
    "checkpoint": {"tokenizer", "_native"},
    "safetensors_file": {"gguf"},
    "gguf": {"_native"},
    "config": set(),
    "errors": set(),
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M)


@pytest.mark.skipif(not SOURCES, reason="runs in a checkout")
def test_cpp_include_directions() -> None:
    for path in SOURCES:
        name = path.relative_to(ROOT / "csrc").as_posix()
        for header in includes(path):
            if CUDA_HEADER.search(header):
                assert name.startswith("cuda/"), f"{name} includes {header}"
            if header.startswith("pybind11"):
                assert name == "bindings.h", f"{name} includes {header}"
            if re.search(r"(^|/)(cpu|cuda)/", header):
                assert name not in {"model.cpp", "model.h", "backend.h", "config.h", "tensor.h"}, f"{name}: {header}"
            if re.fullmatch(r"cpu/(.*-inl|vec_.*|amx)\.h", name):  # levels may share no inline function
                assert header not in {"algorithm", "numeric", "vector", "string"}, f"{name} includes {header}"
            if name.startswith("cpu/"):
                assert not header.endswith(("model.h", "bindings.h")), f"{name} includes {header}"


@pytest.mark.skipif(not SOURCES, reason="runs in a checkout")
def test_python_import_directions() -> None:
    for path in (ROOT / "python" / "gemma_native").glob("*.py"):
        if path.stem == "__init__":
            continue
        text = path.read_text()
        found = set(re.findall(r"^\s*from \.(\w+) import", text, re.M))
        found |= set(re.findall(r"^\s*from gemma_native\.(\w+) import", text, re.M))
        for names in re.findall(r"^\s*from \. import (.+)$", text, re.M):
            found |= {part.split(" as ")[0].strip() for part in names.split(",")}
        assert found - {"errors", "config", "__version__"} == PYTHON[path.stem], f"{path.name} imports {sorted(found)}"

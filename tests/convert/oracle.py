"""llama.cpp's own quantizer, as the judge of ours: `planned` (its dry run) and `quantized` (the whole thing)."""

import ctypes
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from llama_cpp import llama_cpp as C

LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) .*type = +(\w+), (?:.*\((\w+)\))?")


@contextmanager
def log():
    """What llama.cpp logs meanwhile, in pieces."""
    pieces: list[str] = []
    callback = C.llama_log_callback(lambda level, text, data: pieces.append(text.decode("utf-8", "replace")))
    C.llama_log_set(callback, ctypes.c_void_p(0))
    quiet = C.llama_log_callback(lambda level, text, data: None)
    try:
        yield pieces
    finally:
        C.llama_log_set(quiet, ctypes.c_void_p(0))
        log.kept = quiet  # llama.cpp keeps the pointer


def run(source: Path, out: Path, file_type: int, *, dry_run: bool, importance: dict[str, np.ndarray] | None) -> str:
    settings = C.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.dry_run = file_type, 2, dry_run
    if importance is not None:
        entries = (C.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        settings.imatrix = ctypes.cast(entries, type(settings.imatrix))
    with log() as pieces:
        failed = C.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    text = "".join(pieces)
    assert not failed, text[-2000:]
    return text


def planned(source: Path, file_type: int, importance: dict[str, np.ndarray] | None = None) -> dict[str, str]:
    """Tensor name -> type name in lower case, as llama.cpp would choose for this unquantized GGUF."""
    text = run(source, Path("/dev/null"), file_type, dry_run=True, importance=importance)
    return {name: (new or old).lower() for name, old, new in LINE.findall(text)}


def quantized(source: Path, out: Path, file_type: int, importance: dict[str, np.ndarray] | None = None) -> Path:
    run(source, out, file_type, dry_run=False, importance=importance)
    return out


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Tensor name -> (type name in lower case, its bytes), in the order of the file."""
    return {
        tensor.name: (GGMLQuantizationType(tensor.tensor_type).name.lower(), tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }

"""The only door to llama.cpp's quantizers: rows of float32 in, ggml blocks out.

The functions live in libggml-base, which llama-cpp-python ships and whose symbols its handle of libllama resolves. They
are not a public interface, so all are looked up, and their sizes compared with gguf's own table, before the first row.
"""

import ctypes
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.errors import ConvertError

SOURCE_TYPES = {
    "BF16": GGMLQuantizationType.BF16,
    "F16": GGMLQuantizationType.F16,
    "F32": GGMLQuantizationType.F32,
}


def row_bytes(target: GGMLQuantizationType, columns: int) -> int:
    """Bytes of one row; `columns` must be whole blocks."""
    block, size = GGML_QUANT_SIZES[target]
    assert columns % block == 0, f"{columns} columns are not whole blocks of {target.name}"
    return columns // block * size


@dataclass(frozen=True)
class Quantizer:
    library: ctypes.CDLL
    version: str  # of llama-cpp-python

    def quantize(self, target: GGMLQuantizationType, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """float32 (n, k), C-contiguous -> uint8 (n * row_bytes). `importance`: float32 (k,), a weight per column.

        Wrong arguments would end the process or return garbage, hence the assertions. The interpreter's lock is
        released meanwhile; the result does not depend on how rows are split into calls.
        """
        assert rows.dtype == np.float32 and rows.ndim == 2 and rows.flags.c_contiguous
        count, columns = rows.shape
        if importance is not None:
            assert importance.dtype == np.float32 and importance.shape == (columns,) and importance.flags.c_contiguous
        out = np.empty(count * row_bytes(target, columns), np.uint8)
        written = self.library.ggml_quantize_chunk(
            int(target),
            rows.ctypes.data,
            out.ctypes.data,
            0,
            count,
            columns,
            None if importance is None else importance.ctypes.data,
        )
        assert written == out.nbytes, f"{target.name}: {written} bytes written, {out.nbytes} expected"
        return out

    def is_finite(self, kind: GGMLQuantizationType, data: np.ndarray) -> bool:
        """Whether stored numbers (or, for a quantized type, the scales of its blocks) hold no NaN and no infinity."""
        return self.library.ggml_validate_row_data(int(kind), data.ctypes.data, data.nbytes)


def open_quantizer() -> Quantizer:
    """Raises ConvertError where llama-cpp-python is missing or is not the version whose insides we know."""
    try:
        from llama_cpp import llama_cpp as binding
    except ImportError as error:
        raise ConvertError("Converting needs llama-cpp-python: pip install -r requirements-cpu.txt.") from error
    found = version("llama-cpp-python")
    try:
        library = binding._lib
        if sys.platform == "win32":  # symbols are not passed on from one DLL to another
            library = ctypes.CDLL(str(Path(binding._base_path) / "ggml-base.dll"))
        size, number, whole, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        for name, result, arguments in (
            ("ggml_quantize_chunk", size, [number, pointer, pointer, whole, whole, whole, pointer]),
            ("ggml_validate_row_data", ctypes.c_bool, [number, pointer, size]),
            ("ggml_row_size", size, [number, whole]),
            ("ggml_blck_size", whole, [number]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError) as error:
        raise ConvertError(
            f"llama-cpp-python {found} does not offer ggml's quantizers ({error}); "
            "install the version named in requirements-cpu.txt."
        ) from error
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0, GGMLQuantizationType.IQ4_XS):
        if (library.ggml_blck_size(int(kind)), library.ggml_row_size(int(kind), 256)) != (
            GGML_QUANT_SIZES[kind][0],
            row_bytes(kind, 256),
        ):
            raise ConvertError(f"llama-cpp-python {found} and the gguf package disagree about {kind.name}; reinstall both.")
    return Quantizer(library, found)

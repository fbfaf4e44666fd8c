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


class Node(ctypes.Structure):
    """struct ggml_tensor of this version; its size is compared with ggml's own below."""


Node._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Node) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def mean_squares(model: Path, windows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Per matrix of a layer: the mean square of each input column, watched in llama.cpp's graph as llama-imatrix does."""
    library = C._lib
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    assert ctypes.sizeof(Node) == library.ggml_tensor_overhead() - 32
    library.ggml_op_name.restype, library.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    library.ggml_backend_tensor_get.argtypes = [ctypes.POINTER(Node), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def watch(node, ask, data):
        node = ctypes.cast(node, ctypes.POINTER(Node)).contents
        wanted = library.ggml_op_name(node.op) == b"MUL_MAT" and node.src[0].contents.name.startswith(b"blk.")
        if ask or not wanted:
            return bool(wanted)
        inputs = node.src[1].contents
        values = np.empty((inputs.ne[1], inputs.ne[0]), np.float32)
        library.ggml_backend_tensor_get(node.src[1], values.ctypes.data, 0, values.nbytes)
        name = node.src[0].contents.name.decode()
        sums[name] = sums.get(name, 0) + np.square(values.astype(np.float64)).sum(0)
        counts[name] = counts.get(name, 0) + len(values)
        return True

    callback = C.ggml_backend_sched_eval_callback(watch)
    size = len(windows[0])
    with log():
        loaded = C.llama_model_load_from_file(str(model).encode(), C.llama_model_default_params())
        options = C.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = size
        options.cb_eval, options.type_k, options.type_v, options.flash_attn_type = callback, 0, 0, 0  # float32, no flash
        context = C.llama_init_from_model(loaded, options)
        for window in windows:
            C.llama_memory_clear(C.llama_get_memory(context), True)
            batch = C.llama_batch_init(size, 0, 1)
            batch.n_tokens = size
            for i, token in enumerate(window):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, True
                batch.seq_id[i][0] = 0
            assert C.llama_decode(context, batch) == 0
            C.llama_batch_free(batch)
        C.llama_free(context)
        C.llama_model_free(loaded)
    return {name: total / counts[name] for name, total in sums.items()}

"""The only door to llama.cpp as a reader of GGUF files: its tokenizer, its logits, its speed."""

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from llama_cpp import llama_cpp as binding

from convert.errors import ConvertError

SILENT = binding.llama_log_callback(lambda level, text, data: None)
STEP = 64  # positions whose logits are held by llama.cpp at a time: 39 MB with Qwen's vocabulary


@contextmanager
def silence() -> Iterator[None]:
    """llama.cpp logs through one global callback: ours meanwhile, afterwards again what was there."""
    before, data = binding.llama_log_callback(), ctypes.c_void_p()
    binding.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    binding.llama_log_set(SILENT, ctypes.c_void_p())
    try:
        yield
    finally:
        binding.llama_log_set(before, data)


class Model:
    """A GGUF, opened on the CPU. `vocabulary_only` opens none of the weights. Close it, or use `with`."""

    def __init__(self, path: Path, *, vocabulary_only: bool = False, context: int = 512, threads: int = 1) -> None:
        """Raises ConvertError where llama.cpp refuses the file."""
        self._model = self._context = None
        binding.llama_backend_init()
        settings = binding.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = vocabulary_only, 0
        settings.use_extra_bufts = False  # repacked copies would double the memory
        with silence():
            self._model = binding.llama_model_load_from_file(str(path).encode(), settings)
            if not self._model:
                raise ConvertError(f"llama.cpp does not open {path}; it is damaged or made for another version.")
            self._vocabulary = binding.llama_model_get_vocab(self._model)
            self.size = binding.llama_vocab_n_tokens(self._vocabulary)
            if vocabulary_only:
                return
            options = binding.llama_context_default_params()
            options.n_ctx = options.n_batch = context
            options.n_ubatch = min(context, 512)
            options.n_outputs_max = STEP
            options.n_threads = options.n_threads_batch = threads
            self._context = binding.llama_init_from_model(self._model, options)
            if not self._context:
                self.close()
                raise ConvertError(f"llama.cpp has no memory for a context of {context} tokens of {path.name}.")

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with silence():
            if self._context:
                binding.llama_free(self._context)
            if self._model:
                binding.llama_model_free(self._model)
        self._model = self._context = None

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """`special`: whether control tokens in the text are recognised. The text is taken as it is; NFC is the caller's."""
        data = text.encode()
        room = len(data) + 2
        ids = (binding.llama_token * room)()
        count = binding.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, special)
        assert count >= 0, "a token is at least one byte"
        return ids[:count]

    def piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = binding.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def text(self, tokens: list[int]) -> bytes:
        """Their bytes, control tokens written out."""
        return b"".join(map(self.piece, tokens))

    def ends(self) -> set[int]:
        """The tokens that llama.cpp takes for the end of an answer."""
        return {token for token in range(self.size) if binding.llama_vocab_is_eog(self._vocabulary, token)}

    def special(self) -> dict[str, int]:
        """The ids that the file states for eos, eot, bos and padding."""
        return {
            "eos": binding.llama_vocab_eos(self._vocabulary),
            "eot": binding.llama_vocab_eot(self._vocabulary),
            "bos": binding.llama_vocab_bos(self._vocabulary),
            "padding": binding.llama_vocab_pad(self._vocabulary),
        }

    def adds(self) -> bool:
        """Whether llama.cpp would put a bos before or an eos after a text by itself."""
        return binding.llama_vocab_get_add_bos(self._vocabulary) or binding.llama_vocab_get_add_eos(self._vocabulary)

    def metadata(self, key: str) -> str | None:
        name, size = key.encode(), 1 << 20
        buffer = ctypes.create_string_buffer(size)
        count = binding.llama_model_meta_val_str(self._model, name, buffer, size)
        return None if count < 0 else buffer.value.decode("utf-8", "replace")

    def template(self) -> str | None:
        text = binding.llama_model_chat_template(self._model, None)
        return None if text is None else text.decode()

    def _decode(self, tokens: np.ndarray, start: int, wanted: bool) -> None:
        """Read tokens at positions start, start + 1, ...; `wanted`: keep all their logits, else none."""
        batch = binding.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), start + i, 1, wanted
                batch.seq_id[i][0] = 0
            status = binding.llama_decode(self._context, batch)
        finally:
            binding.llama_batch_free(batch)
        if status:
            raise ConvertError(f"llama.cpp stopped reading the text (status {status}).")

    def logits(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """float32 (len(tokens) - start, vocabulary): what follows each of the tokens from `start` on, in an empty context."""
        with silence():
            binding.llama_memory_clear(binding.llama_get_memory(self._context), True)
            if start:
                self._decode(tokens[:start], 0, False)
            out = np.empty((len(tokens) - start, self.size), np.float32)
            for first in range(start, len(tokens), STEP):
                some = tokens[first : first + STEP]
                self._decode(some, first, True)
                held = binding.llama_get_logits(self._context)
                out[first - start : first - start + len(some)] = np.ctypeslib.as_array(held, (len(some), self.size))
        return out

    def speed(self, read: int = 128, write: int = 32) -> tuple[float, float]:
        """Tokens per second for reading a prompt and for writing one by one, measured once, after a warm-up."""
        tokens = np.arange(1, read + 1) % self.size
        with silence():
            memory = binding.llama_get_memory(self._context)
            self._decode(tokens[:8], 0, True)
            binding.llama_memory_clear(memory, True)
            began = time.perf_counter()
            self._decode(tokens, 0, False)
            binding.llama_synchronize(self._context)
            middle = time.perf_counter()
            for i in range(write):
                self._decode(tokens[i : i + 1], read + i, True)
                binding.llama_get_logits(self._context)
            done = time.perf_counter()
        return read / (middle - began), write / (done - middle)

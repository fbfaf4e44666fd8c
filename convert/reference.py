"""Qwen3's forward pass in numpy, straight from the safetensors, one matrix in memory at a time.

The truth that a GGUF is compared with: float32 throughout, written from the architecture and not from the converter, so
that a wrong name, norm or rotation cannot hide in both. It is also where an importance matrix is collected.
Architecture as in transformers' modeling_qwen3.py: RMS norms before attention and MLP and on each head's queries and keys,
grouped attention, rotary positions in two halves, SwiGLU.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import log, pi

import numpy as np

from convert.source import Shape, Source
from convert.weights import Weight

ROWS = 4 << 20  # numbers of a matrix that are widened to float32 at a time
TOKENS = 1024  # positions in the MLP at a time

Watch = Callable[[str, np.ndarray], None]  # GGUF name of a matrix, its inputs (positions, columns)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def multiply(x: np.ndarray, matrix: Weight) -> np.ndarray:
    """x (n, columns) times the transposed matrix (rows, columns) -> (n, rows), widening a slab of rows at a time."""
    out = np.empty((len(x), matrix.rows), np.float32)
    step = max(1, ROWS // matrix.columns)
    for start in range(0, matrix.rows, step):
        stop = min(start + step, matrix.rows)
        np.matmul(x, matrix.float32(start, stop).T, out=out[:, start:stop])
    return out


def frequencies(shape: Shape) -> tuple[np.ndarray, float]:
    """Radians per position for each pair of a head's numbers, and the factor on cos and sin (YaRN, arXiv 2309.00071)."""
    dims, theta, scaling = shape.head_dim, shape.rope_theta, shape.rope_scaling
    plain = theta ** (-np.arange(0, dims, 2) / dims)
    if not scaling:
        return plain, 1.0
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return plain / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or shape.positions

    def turning(rotations: float) -> float:
        """The dimension that turns this often within the original context."""
        return dims * log(original / (rotations * 2 * pi)) / (2 * log(theta))

    low = max(np.floor(turning(scaling.get("beta_fast") or 32)), 0)
    high = min(np.ceil(turning(scaling.get("beta_slow") or 1)), dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), 0.1 * log(factor) + 1.0


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (positions, heads, dims); the first half of a head's numbers turns against the second."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


class Reference:
    """The model itself, as slow as its weights can be read."""

    def __init__(self, source: Source) -> None:
        self.shape, self.weights, self.size = source.shape, source.weights, source.shape.vocabulary

    def _vector(self, name: str) -> np.ndarray:
        return self.weights[name].float32(0, 1)[0]

    def hidden(self, windows: Sequence[np.ndarray], watch: Watch | None = None) -> Iterator[list[np.ndarray] | int]:
        """Yields the number of layers done, then, last, one float32 (tokens, hidden) per window, after the final norm.

        `windows` hold token ids and do not see each other. `watch` is shown the input of every matrix.
        """
        shape = self.shape
        lengths = [len(window) for window in windows]
        edges = np.cumsum([0, *lengths])
        embedding = self.weights["token_embd.weight"]
        x = np.concatenate([embedding.float32(int(token), int(token) + 1) for window in windows for token in window])
        radians, factor = frequencies(shape)
        angles = np.concatenate([np.arange(length) for length in lengths])[:, None] * radians
        cos, sin = (np.float32(factor) * f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        for layer in range(shape.layers):
            x = x + self._attention(f"blk.{layer}.", x, cos, sin, edges, watch)
            for start in range(0, len(x), TOKENS):
                x[start : start + TOKENS] += self._mlp(f"blk.{layer}.", x[start : start + TOKENS], watch)
            yield layer + 1
        x = rms_norm(x, self._vector("output_norm.weight"), shape.epsilon)
        yield [x[start:stop] for start, stop in pairwise(edges)]

    def _apply(self, name: str, x: np.ndarray, watch: Watch | None) -> np.ndarray:
        if watch:
            watch(name, x)
        return multiply(x, self.weights[name])

    def _attention(
        self, layer: str, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, edges: np.ndarray, watch: Watch | None
    ) -> np.ndarray:
        shape, count = self.shape, len(x)
        x = rms_norm(x, self._vector(f"{layer}attn_norm.weight"), shape.epsilon)
        queries, keys, values = (
            self._apply(f"{layer}attn_{part}.weight", x, watch).reshape(count, -1, shape.head_dim) for part in "qkv"
        )
        queries = rotate(rms_norm(queries, self._vector(f"{layer}attn_q_norm.weight"), shape.epsilon), cos, sin)
        keys = rotate(rms_norm(keys, self._vector(f"{layer}attn_k_norm.weight"), shape.epsilon), cos, sin)
        grouped = shape.heads // shape.kv_heads
        mixed = np.empty((count, shape.heads, shape.head_dim), np.float32)
        scale = np.float32(shape.head_dim**-0.5)
        for start, stop in pairwise(edges):
            length = stop - start
            future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
            for head in range(shape.heads):
                scores = queries[start:stop, head] @ keys[start:stop, head // grouped].T * scale + future
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                mixed[start:stop, head] = weights @ values[start:stop, head // grouped]
        return self._apply(f"{layer}attn_output.weight", mixed.reshape(count, -1), watch)

    def _mlp(self, layer: str, x: np.ndarray, watch: Watch | None) -> np.ndarray:
        x = rms_norm(x, self._vector(f"{layer}ffn_norm.weight"), self.shape.epsilon)
        gate = self._apply(f"{layer}ffn_gate.weight", x, watch)
        with np.errstate(over="ignore"):  # exp of a large number is infinity, and its reciprocal the right 0
            gate /= 1 + np.exp(-gate)
        gate *= self._apply(f"{layer}ffn_up.weight", x, watch)
        return self._apply(f"{layer}ffn_down.weight", gate, watch)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """(n, hidden) after the final norm -> logits (n, vocabulary)."""
        return multiply(hidden, self.weights.get("output.weight", self.weights["token_embd.weight"]))

"""How far a file's predictions are from its source's: KL divergence and agreement, token by token, in running sums.

Scored are the positions of the second half of each window, as llama.cpp's perplexity tool does, so that figures compare;
of a token's 152,000 log-probabilities nothing but one float is kept. Tokens of a window depend on each other, so the
intervals come from drawing whole windows again (bootstrap).
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convert.llama import Model
from convert.reference import Reference

GROUP = 4096  # positions that go through the reference together
ROWS = 16  # positions scored at a time: 10 MB per array with Qwen's vocabulary


@dataclass(frozen=True)
class Divergence:
    """Quantized against base, over all scored tokens. Intervals are of 95 %."""

    tokens: int
    windows: int
    window: int  # tokens in each
    kld_mean: float  # nats
    kld_interval: tuple[float, float]
    kld_median: float
    kld_p90: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top: float  # share of tokens whose most probable successor is the same
    same_top_interval: tuple[float, float]
    perplexity_base: float
    perplexity: float
    delta_p_rms: float  # of the probability of the text's own next token


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


@dataclass(frozen=True)
class Scores:
    """Per scored token of one window."""

    kld: np.ndarray
    same: np.ndarray
    base_nll: np.ndarray
    nll: np.ndarray
    delta_p: np.ndarray


def score(base: np.ndarray, other: np.ndarray, following: np.ndarray) -> Scores:
    """Both logits are (n, vocabulary); `following` are the n tokens that the text goes on with."""
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(following), ROWS):
        some = slice(start, start + ROWS)
        p, q = log_softmax(base[some]), log_softmax(other[some])
        index = np.arange(len(p)), following[some]
        kld = (np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64)
        pt, qt = p[index].astype(np.float64), q[index].astype(np.float64)
        parts.append((kld, p.argmax(-1) == q.argmax(-1), -pt, -qt, np.exp(qt) - np.exp(pt)))
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the weighted mean over windows, drawn with a fixed seed; (nan, nan) for a single window."""
    if len(values) < 2:
        return (float("nan"), float("nan"))
    drawn = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    means = (values[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def summarize(scored: Sequence[Scores], window: int) -> Divergence:
    every = {name: np.concatenate([getattr(s, name) for s in scored]) for name in Scores.__dataclass_fields__}
    weights = np.array([len(s.kld) for s in scored], float)
    kld = every["kld"]
    return Divergence(
        tokens=len(kld),
        windows=len(scored),
        window=window,
        kld_mean=float(kld.mean()),
        kld_interval=interval(np.array([s.kld.mean() for s in scored]), weights),
        kld_median=float(np.median(kld)),
        kld_p90=float(np.quantile(kld, 0.9)),
        kld_p99=float(np.quantile(kld, 0.99)),
        kld_p999=float(np.quantile(kld, 0.999)),
        kld_max=float(kld.max()),
        same_top=float(every["same"].mean()),
        same_top_interval=interval(np.array([s.same.mean() for s in scored]), weights),
        perplexity_base=float(np.exp(every["base_nll"].mean())),
        perplexity=float(np.exp(every["nll"].mean())),
        delta_p_rms=float(np.sqrt(np.square(every["delta_p"]).mean())),
    )


def base_logits(
    base: Reference | Model, windows: Sequence[np.ndarray], start: int
) -> Iterator[tuple[float, np.ndarray | None]]:
    """(tokens read so far, logits of the next window or None while that takes time)."""
    size = len(windows[0])
    if isinstance(base, Model):
        for i, window in enumerate(windows):
            yield (i + 1) * size, base.logits(window[:-1], start)
        return
    group = max(1, GROUP // size)
    for first in range(0, len(windows), group):
        some = windows[first : first + group]
        for state in base.hidden([window[:-1] for window in some]):
            if isinstance(state, int):
                yield (first + len(some) * state / base.shape.layers) * size, None
            else:
                for hidden in state:
                    yield (first + len(some)) * size, base.head(hidden[start:])


def compare(
    base: Reference | Model, others: Sequence[Model], windows: Sequence[np.ndarray]
) -> Generator[float, None, list[Divergence]]:
    """Yields the work done, from 0 to 1; returns one Divergence for each of `others`."""
    size, start = len(windows[0]), len(windows[0]) // 2
    scored: list[list[Scores]] = [[] for _ in others]
    waiting, parts = iter(windows), (1 + len(others)) * size * len(windows)
    for read, logits in base_logits(base, windows, start):
        if logits is not None:
            window = next(waiting)
            for other, scores in zip(others, scored, strict=True):
                scores.append(score(logits, other.logits(window[:-1], start), window[start + 1 :]))
        yield (read + sum(map(len, scored)) * size) / parts
    return [summarize(scores, size) for scores in scored]

"""Which token comes next: penalty, temperature, top-k, top-p, min-p and seeded noise, on any device, without waiting for it.

Chosen is the argmax of logits plus Gumbel noise, which draws from the softmax (Gumbel 1954; Maddison et al., "A* Sampling",
2014). The noise is a hash of (seed, position, token id), so equal seeds give equal tokens whoever runs beside.
`pytest tests/chat/test_cuda_sampling.py`
"""

import math
from dataclasses import dataclass

import torch

from chat.engine import Sampling

COOLEST = 1e-4  # below it division would overflow float32, and nothing but the best token is left anyway


@dataclass(frozen=True)
class Choice:
    """A Sampling as numbers the device can use without a question: off is a number too."""

    seed: int
    temperature: float  # 0 is greedy
    top_k: int  # 1 to the vocabulary's size
    top_p: float  # 2 is off: a rounded sum of all probabilities may pass 1
    log_min_p: float  # -inf is off
    penalty: float  # 1 is off
    slot: int  # the row that remembers which tokens the request has seen

    @classmethod
    def of(cls, sampling: Sampling, seed: int, slot: int, vocabulary: int) -> "Choice":
        return cls(
            seed=seed,
            temperature=float(sampling.temperature),
            top_k=min(int(sampling.top_k) or vocabulary, vocabulary),
            top_p=float(sampling.top_p) if sampling.top_p < 1 else 2.0,
            log_min_p=math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
            penalty=float(sampling.repetition_penalty),
            slot=slot,
        )


Number = torch.Tensor | float | int  # of one request, or (requests, 1)


def penalised(scores: torch.Tensor, seen: torch.Tensor, penalty: Number) -> torch.Tensor:
    """Scores of the tokens that were seen, made smaller; all (requests, vocabulary)."""
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def heated(
    scores: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: Number, log_min_p: Number, noise: torch.Tensor
) -> torch.Tensor:
    """What the argmax is taken of. `scores`, `noise` (requests, vocabulary) float32; `top_k` (requests, 1) int64."""
    heat = scores / temperature.clamp(min=COOLEST)
    ordered = heat.sort(dim=-1, descending=True).values
    kth = ordered.gather(-1, top_k - 1)
    ordered = ordered.masked_fill(ordered < kth, -math.inf)
    share = ordered.softmax(dim=-1)
    kept = ((share.cumsum(dim=-1) - share) < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    pth = ordered.gather(-1, kept - 1)
    lowest = torch.maximum(torch.maximum(kth, pth), ordered[:, :1] + log_min_p)
    drawn = (heat + noise).masked_fill(heat < lowest, -math.inf)
    return torch.where(temperature == 0, scores, drawn)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Random int32 -> standard Gumbel noise, float32. Fine where it counts: small uniforms make the large values."""
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def mixed(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of MurmurHash3 (Austin Appleby, public domain) on int32 that wrap around."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * (0x85EBCA6B - (1 << 32))
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * (0xC2B2AE35 - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def key(seed: int, position: int) -> int:
    """One 32-bit number for a request's step. `position` counts the tokens before the one to draw, prompt included."""
    return _mixed(_mixed(seed + 0x9E3779B9) ^ ((position * 0x27D4EB2F) & 0xFFFFFFFF))


def _mixed(x: int) -> int:
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)

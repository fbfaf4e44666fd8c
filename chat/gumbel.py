"""Per-request sampling on the device, seed included, as one processor of transformers' continuous batching.

Chosen is the argmax of logits plus Gumbel noise, which draws from the softmax (Gumbel 1954; Maddison et al., "A* Sampling",
2014). The noise is a hash of (seed, position, token id), so a request's tokens do not depend on who runs beside it, and
nothing waits for the host: under a CUDA graph the hash reads one number per request. `pytest tests/chat/test_cuda_sampling.py`
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context

from chat.engine import Sampling

KEY, TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, SLOT = range(7)
FLOATS = [TEMPERATURE, TOP_P, MIN_P, PENALTY]
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


class GumbelSampler(ContinuousBatchingLogitsProcessorList):
    """Takes the place of the library's processors; every request carries a `Choice` as `choice`.

    The library hands each request's numbers to the device as one column of int32 (floats keep their bits). `vocabulary`
    counts the logits' columns, `requests` the rows of a batch.
    """

    def __init__(self, vocabulary: int, requests: int, device: torch.device) -> None:
        super().__init__(LogitsProcessorList())
        self.tensors_required = 7
        self.do_processing = True
        self.supported_keys = {"choice": Choice}
        self.stream: torch.cuda.Stream | None = None  # the one the batches run on
        self._requests = requests
        self._none = Choice(0, 0.0, vocabulary, 2.0, -math.inf, 1.0, slot=requests)  # padding writes where nobody reads
        self._ids = mixed(torch.arange(vocabulary, dtype=torch.int32, device=device))
        self._seen = torch.zeros((requests + 1, vocabulary), dtype=torch.bool, device=device)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.copy_(torch.from_numpy(_columns([(self._none, 0)])))

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        columns = [(state.logit_processor_kwargs.get("choice", self._none), state.position_offset) for state in states]
        for state, (choice, position) in zip(states, columns, strict=True):
            if choice.penalty != 1.0 and position == len(state.initial_tokens):
                self._remember(choice.slot, state.initial_tokens)
        columns += [(self._none, 0)] * (self._requests - len(columns))  # what an earlier batch left there
        arg_storage[:, : len(columns)].copy_(torch.from_numpy(_columns(columns)))
        return arg_storage

    def _remember(self, slot: int, tokens: list[int]) -> None:
        """A request starts with its prompt. In the order of the batches: one in flight may still mark for the last owner."""
        with stream_context(self.stream):
            self._seen[slot].zero_()
            self._seen[slot].index_fill_(0, torch.tensor(tokens, device=self._seen.device), True)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:
        """`input_ids` (requests,), the last token of each; `scores` (requests, vocabulary) float32; returns what the
        argmax is taken of, in the same shape."""
        args = logits_processor_args
        temperature, top_p, log_min_p, penalty = (args[row].view(torch.float32).unsqueeze(-1) for row in FLOATS)
        slot = args[SLOT].long()

        self._seen.index_put_((slot, input_ids.long()), torch.ones_like(slot, dtype=torch.bool))
        scores = torch.where(self._seen[slot], torch.where(scores > 0, scores / penalty, scores * penalty), scores)

        heated = scores / temperature.clamp(min=COOLEST)
        ordered = heated.sort(dim=-1, descending=True).values
        kth = ordered.gather(-1, (args[TOP_K].long() - 1).unsqueeze(-1))
        ordered = ordered.masked_fill(ordered < kth, -math.inf)
        share = ordered.softmax(dim=-1)
        kept = ((share.cumsum(dim=-1) - share) < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        pth = ordered.gather(-1, kept - 1)
        lowest = torch.maximum(torch.maximum(kth, pth), ordered[:, :1] + log_min_p)

        noise = gumbel(mixed(self._ids ^ args[KEY].unsqueeze(-1)))
        drawn = (heated + noise).masked_fill(heated < lowest, -math.inf)
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


def _columns(requests: list[tuple[Choice, int]]) -> np.ndarray:
    """(7, requests) int32, a column for each (choice, position)."""
    table = np.empty((7, len(requests)), np.uint32)
    table[KEY] = [key(choice.seed, position) for choice, position in requests]
    table[TOP_K] = [choice.top_k for choice, _ in requests]
    table[SLOT] = [choice.slot for choice, _ in requests]
    floats = table.view(np.float32)
    floats[TEMPERATURE] = [choice.temperature for choice, _ in requests]
    floats[TOP_P] = [choice.top_p for choice, _ in requests]
    floats[MIN_P] = [choice.log_min_p for choice, _ in requests]
    floats[PENALTY] = [choice.penalty for choice, _ in requests]
    return table.view(np.int32)

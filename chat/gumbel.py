"""chat/draw.py for many requests at once, as one processor of transformers' continuous batching.

Under a CUDA graph the noise's hash reads one number per request; nothing waits for the host.
`pytest tests/chat/test_cuda_sampling.py`
"""

import math

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context

from chat.draw import Choice, gumbel, heated, key, mixed, penalised

KEY, TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, SLOT = range(7)
FLOATS = [TEMPERATURE, TOP_P, MIN_P, PENALTY]


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
        noise = gumbel(mixed(self._ids ^ args[KEY].unsqueeze(-1)))
        scores = penalised(scores, self._seen[slot], penalty)
        return heated(scores, temperature, args[TOP_K].long().unsqueeze(-1), top_p, log_min_p, noise)


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

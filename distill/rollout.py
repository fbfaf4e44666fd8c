"""Answers sampled for a whole window at once: sorted by length, KV cache on, finished rows dropped.

Rows of a batch all start at column 0, and a longer prompt is simply fed until it is used up while shorter ones already
write. So there is no padding, no attention mask, and a row's numbers do not depend on its neighbours.

A token is drawn by inverting the distribution at one number that depends on (seed, window, row, position) alone: samples do
not change with batch split, process count or resume point (but for near-ties at the 1e-6 by which logits move with the
batch's shape). One number per token, where Gumbel noise would take one per vocabulary entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from distill.models import backbone, head_of
from distill.windows import uniform

ROOM = 64  # the cache grows by so many positions at least


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room to spare: a DynamicLayer copies everything for every token."""

    def __init__(self, **options):
        super().__init__(**options)
        self.length = 0
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            room = end + max(ROOM, end // 2)
            grown = [new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (key_states, value_states)]
            for new, old in zip(grown, self.buffers, strict=False):
                new[:, :, : self.length] = old[:, :, : self.length]
            self.buffers = grown
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length, self.is_initialized = end, True
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


@dataclass(frozen=True)
class Sampling:
    """How to draw. temperature 0 is greedy. `stream` names the noise: equal streams, windows and keys draw equal numbers."""

    new_tokens: int
    ends: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    window: int = 0
    stream: str = "sample"
    budget: int = 65536  # tokens in the KV cache
    vocabulary: int = 0  # tokens beyond it (a padded head) are never drawn; 0: all may be


@dataclass
class Stats:
    """What a rollout did: decoding passes, rows fed through them, tokens kept."""

    passes: int = 0
    fed: int = 0
    tokens: int = 0


def groups(lengths: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Rows in batches by prompt length, within the KV budget, with prompts of about one length."""
    spread = max(16, sampling.new_tokens // 4)
    made: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = made and (len(made[-1]) + 1) * (longest + sampling.new_tokens) > sampling.budget
        if not made or full or longest - lengths[index] > spread:
            made.append([])
            longest = lengths[index]
        made[-1].append(index)
    return made


def rollout(
    model: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, stats: Stats | None = None
) -> list[list[int]]:
    """New tokens for each prompt (ids), the end token included; an answer without one ran into `new_tokens`.

    keys: a number per row that names its noise. The model is used as it is, in `eval` mode and without gradients.
    """
    training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for group in groups([len(prompt) for prompt in prompts], sampling):
            write(model, [prompts[i] for i in group], [keys[i] for i in group], [answers[i] for i in group], sampling, stats)
    model.train(training)
    return answers


def write(model, prompts, keys, answers, sampling: Sampling, stats: Stats | None) -> None:
    """Fills `answers` for one batch."""
    head = head_of(model)
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    alive = list(range(len(prompts)))  # the rows in the batch; those that are finished stay until they are a quarter of it
    finished: set[int] = set()
    column = min(map(len, prompts))
    ids = torch.tensor([list(prompt[:column]) for prompt in prompts], device=head.device)
    while True:
        hidden = backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        writing = [row for row, index in enumerate(alive) if len(prompts[index]) <= column and index not in finished]
        drawn = draw(hidden[writing], head, [(keys[alive[row]], column) for row in writing], sampling)
        if stats:
            stats.passes, stats.fed, stats.tokens = stats.passes + 1, stats.fed + len(alive), stats.tokens + len(writing)
        following = [int(prompts[index][column]) if len(prompts[index]) > column else 0 for index in alive]
        for row, token in zip(writing, drawn, strict=True):
            index = alive[row]
            answers[index].append(token)
            following[row] = token
            if token in sampling.ends or len(answers[index]) >= sampling.new_tokens:
                finished.add(index)
        column += 1
        kept = [row for row, index in enumerate(alive) if index not in finished]
        if not kept:
            return
        if 4 * (len(alive) - len(kept)) >= len(alive):
            cache.batch_select_indices(torch.tensor(kept, device=head.device))
            alive, following = [alive[row] for row in kept], [following[row] for row in kept]
        ids = torch.tensor(following, device=head.device)[:, None]


def draw(hidden: Tensor, head: Tensor, places: Sequence[tuple[int, int]], sampling: Sampling) -> list[int]:
    """A token per row of hidden [n, H]."""
    if not len(hidden):
        return []
    head = head[: sampling.vocabulary or len(head)]
    logits = (hidden.to(head.dtype) @ head.T).float()
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    share = torch.softmax(logits / sampling.temperature, -1)
    order = None
    if sampling.top_p < 1:
        share, order = share.sort(dim=-1, descending=True, stable=True)
        share = share.masked_fill(share.cumsum(-1) - share >= sampling.top_p, 0)
    total = share.double().cumsum(-1)
    numbers = [uniform(sampling.seed, sampling.stream, sampling.window, key, column) for key, column in places]
    target = torch.tensor(numbers, dtype=torch.float64, device=total.device)[:, None] * total[:, -1:]
    chosen = torch.searchsorted(total, target, right=True).clamp_(max=total.shape[1] - 1)
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1).tolist()

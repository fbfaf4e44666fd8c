"""Answers sampled for a whole window at once: sorted by length, KV cache on, finished rows dropped.

Prompts are read in sub-batches of similar length, then all rows write together, their caches aligned at the right. For one
query per row, grouped heads are passed as queries of their shared key head: no key or value is ever copied or repeated.

A window beyond the cache's budget is written group after group. Letting waiting prompts in as rows end would be 1.57x as fast
(32 rows, 8 at a time, a tiny model, one run of tests/benchmarks/distill_refill.py); it is not built in yet.

A token is drawn by inverting the distribution at one number that depends on (seed, window, row, position) alone: samples do
not change with batch split, process count or resume point (but for near-ties at the 1e-6 by which logits move with the
batch's shape). One number per token, where Gumbel noise would take one per vocabulary entry.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from distill.models import backbone, head_of
from distill.windows import by_length, uniform

ROOM = 64  # the cache grows by so many positions at least
READ = 8192  # padded tokens of prompts read in one pass


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room to spare: a DynamicLayer copies everything for every token."""

    def __init__(self, **options):
        super().__init__(**options)
        self.length = 0
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            self.grow(key_states.shape[0], end + max(ROOM, end // 2), (key_states, value_states))
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length, self.is_initialized = end, True
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def grow(self, rows: int, room: int, like: Sequence[Tensor]) -> None:
        grown = [new.new_zeros(rows, new.shape[1], room, new.shape[3]) for new in like]
        for new, old in zip(grown, self.buffers, strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        self.buffers = grown

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: Tensor, first: int) -> None:
        """Only these rows, only columns from `first` on."""
        self.buffers = [buffer[:, :, first:].index_select(0, rows) for buffer in self.buffers]
        self.length -= first

    @classmethod
    def joined(cls, parts: Sequence["GrowingLayer"], room: int) -> "GrowingLayer":
        """Rows of all parts, aligned at the right; zeros stand left of the shorter ones."""
        joined = cls()
        joined.length = max(part.length for part in parts)
        joined.grow(sum(len(part.buffers[0]) for part in parts), joined.length + room, parts[0].buffers)
        first = 0
        for part in parts:
            rows = slice(first, first := first + len(part.buffers[0]))
            for buffer, own in zip(joined.buffers, part.buffers, strict=True):
                buffer[rows, :, joined.length - part.length : joined.length] = own[:, :, : part.length]
            part.buffers, part.keys, part.values = [], None, None
        joined.is_initialized = True
        return joined


def attend_one(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling=None, **kwargs):
    """Attention of one query per row: query [B, Hq, 1, D] as [B, Hk, Hq/Hk, D] queries of the shared heads [B, Hk, T, D]."""
    rows, heads, _, size = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """The model's attention is `attend_one`."""
    AttentionInterface.register("distill_decoding", attend_one)
    before = model.config._attn_implementation
    model.config._attn_implementation = "distill_decoding"
    try:
        yield
    finally:
        model.config._attn_implementation = before


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
    """Rows in batches by prompt length, within the budget of the KV cache."""
    return by_length([length + sampling.new_tokens for length in lengths], sampling.budget, enough=sampling.budget)


def rollout(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampling: Sampling,
    stats: Stats | None = None,
    head: Tensor | None = None,
) -> list[list[int]]:
    """New tokens for each prompt (ids), the end token included; an answer without one ran into `new_tokens`.

    keys: a number per row that names its noise. head: the model's, where its own is in shards.
    The model is used as it is, in `eval` mode and without gradients.
    """
    training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for group in groups([len(prompt) for prompt in prompts], sampling):
            parts = ([things[i] for i in group] for things in (prompts, keys, answers))
            write(model, *parts, sampling, stats, head_of(model) if head is None else head)
    model.train(training)
    return answers


def read(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> tuple[list[int], Cache, Tensor]:
    """(order, cache, last hidden states [B, H]) of prompts read in sub-batches of similar length; rows are in `order`."""
    device = head_of(model).device
    order, caches, last = [], [], []
    for part in by_length([len(prompt) for prompt in prompts], READ):
        length = max(len(prompts[index]) for index in part)
        padding = torch.tensor([length - len(prompts[index]) for index in part])
        ids = torch.tensor([[0] * (length - len(prompts[index])) + list(prompts[index]) for index in part])
        columns = torch.arange(length)
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        found = backbone(model)(
            input_ids=ids.to(device),
            attention_mask=(columns >= padding[:, None]).to(device) if padding.any() else None,
            position_ids=(columns - padding[:, None]).clamp(min=0).to(device),
            past_key_values=cache,
            use_cache=True,
        )
        order += part
        caches.append(cache)
        last.append(found.last_hidden_state[:, -1])
    room = min(sampling.new_tokens, 4 * ROOM)
    layers = [GrowingLayer.joined(parts, room) for parts in zip(*(cache.layers for cache in caches), strict=True)]
    return order, Cache(layers=layers), torch.cat(last)


def write(model, prompts, keys, answers, sampling: Sampling, stats: Stats | None, head: Tensor) -> None:
    """Fills `answers` for one batch."""
    alive, cache, hidden = read(model, prompts, sampling)
    lengths = torch.tensor([len(prompts[index]) for index in alive])
    columns = int(lengths.max())
    starts = columns - lengths  # the column of each row's first token
    finished: set[int] = set()
    with decoding(model):
        for step in range(sampling.new_tokens):
            writing = [row for row, index in enumerate(alive) if index not in finished]
            drawn = draw(hidden[writing], head, [(keys[alive[row]], step) for row in writing], sampling)
            following = [0] * len(alive)  # finished rows stay, unread, until they are a quarter of the batch
            for row, token in zip(writing, drawn, strict=True):
                following[row] = token
                answers[alive[row]].append(token)
                if token in sampling.ends:
                    finished.add(alive[row])
            kept = [row for row in writing if alive[row] not in finished]
            if stats:
                stats.passes, stats.fed, stats.tokens = stats.passes + 1, stats.fed + len(alive), stats.tokens + len(writing)
            if not kept or step + 1 == sampling.new_tokens:
                return
            if 4 * (len(alive) - len(kept)) >= len(alive):
                first = int(starts[kept].min())
                for layer in cache.layers:
                    layer.keep(torch.tensor(kept, device=head.device), first)
                alive, following = [alive[row] for row in kept], [following[row] for row in kept]
                starts, columns = starts[kept] - first, columns - first
            columns += 1
            seen = torch.arange(columns) >= starts[:, None]
            hidden = backbone(model)(
                input_ids=torch.tensor(following, device=head.device)[:, None],
                attention_mask=seen[:, None, None].to(head.device),
                position_ids=(columns - 1 - starts)[:, None].to(head.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]


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

"""Would it pay to let waiting prompts in while others still write? Refilled rows beside groups one after the other.

Run: python tests/benchmarks/distill_refill.py [--rows 64] [--slots 16] [--rounds 5]. Only when a window exceeds the budget of
the KV cache is anybody waiting; `--slots` says how many rows fit. Both ways draw the same tokens (asserted), in turn, on one
thread; answers end at random with the mean length that `--mean` says. The median of paired ratios is printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.cache_utils import Cache

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill import models, rollout
from distill.rollout import GrowingLayer, Sampling


def refilled(model, prompts, keys, sampling: Sampling, slots: int) -> list[list[int]]:
    """As rollout.rollout, but for rows that enter as soon as a quarter of the places is free."""
    head = models.head_of(model)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    alive: list[int] = []
    layers: list[GrowingLayer] = []
    finished: set[int] = set()
    hidden, starts, columns = torch.zeros(0), torch.zeros(0), 0
    with torch.inference_mode():
        while waiting or alive:
            free = slots - len(alive)
            if waiting and 4 * free >= slots:
                entering, waiting = waiting[:free], waiting[free:]
                order, cache, last = rollout.read(model, [prompts[index] for index in entering], sampling)
                alive = alive + [entering[place] for place in order]
                lengths = torch.tensor([len(prompts[index]) + len(answers[index]) for index in alive])
                if layers:
                    pairs = zip(layers, cache.layers, strict=True)
                    layers, hidden = [GrowingLayer.joined(pair, 64) for pair in pairs], torch.cat([hidden, last])
                else:
                    layers, hidden = cache.layers, last
                columns = layers[0].length
                starts = columns - lengths
            writing = [row for row, index in enumerate(alive) if index not in finished]
            places = [(keys[alive[row]], len(answers[alive[row]])) for row in writing]
            following = [0] * len(alive)
            for row, token in zip(writing, rollout.draw(hidden[writing], head, places, sampling), strict=True):
                following[row] = token
                answers[alive[row]].append(token)
                if token in sampling.ends or len(answers[alive[row]]) == sampling.new_tokens:
                    finished.add(alive[row])
            kept = [row for row in writing if alive[row] not in finished]
            if not kept:
                alive, layers = [], []
                continue
            if 4 * (len(alive) - len(kept)) >= len(alive):
                first = int(starts[kept].min())
                for layer in layers:
                    layer.keep(torch.tensor(kept), first)
                alive, following = [alive[row] for row in kept], [following[row] for row in kept]
                starts, columns = starts[kept] - first, columns - first
            columns += 1
            seen = torch.arange(columns) >= starts[:, None]
            with rollout.decoding(model):
                hidden = models.backbone(model)(
                    input_ids=torch.tensor(following)[:, None],
                    attention_mask=seen[:, None, None],
                    position_ids=(columns - 1 - starts)[:, None],
                    past_key_values=Cache(layers=layers),
                    use_cache=True,
                ).last_hidden_state[:, -1]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mean", type=int, default=64, help="length of an answer in tokens; at most four times as much")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    given = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    vocabulary = 4096
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=given.hidden,
        intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=max(1, given.hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
        model = models.load_model(str(Path(folder)), "student", torch.float32)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 120, (given.rows,), generator=random).tolist()
    prompts = [torch.randint(0, vocabulary, (length,), generator=random).tolist() for length in lengths]
    ends = tuple(range(0, vocabulary, given.mean))
    times: dict[str, list[float]] = {"groups": [], "refilled": []}
    new_tokens = 4 * given.mean
    budget = given.slots * (sum(lengths) // given.rows + new_tokens)
    for turn in range(given.rounds + 1):
        sampling = Sampling(new_tokens, ends, seed=turn, budget=budget)
        for name in ("groups", "refilled"):
            begin = time.process_time()
            if name == "groups":
                found = rollout.rollout(model, prompts, range(given.rows), sampling)
            else:
                assert refilled(model, prompts, range(given.rows), sampling, given.slots) == found
            times[name].append(time.process_time() - begin)
    ratios = [groups / filled for groups, filled in zip(times["groups"][1:], times["refilled"][1:], strict=True)]
    print(
        f"{given.rows} rows, {given.slots} at a time, answers of {given.mean} tokens: groups "
        f"{statistics.median(times['groups'][1:]):.2f} s, refilled {statistics.median(times['refilled'][1:]):.2f} s of CPU; "
        f"refilling is {statistics.median(ratios):.2f}x as fast ({min(ratios):.2f}-{max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()

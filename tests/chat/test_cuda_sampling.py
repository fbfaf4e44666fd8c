"""The sampler of the CUDA engine against transformers' own warpers and the softmax.

`pytest tests/chat/test_cuda_sampling.py`
"""

import math
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402 - behind the skip
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState  # noqa: E402

from chat.draw import Choice, _mixed, gumbel, key, mixed  # noqa: E402
from chat.engine import Sampling  # noqa: E402
from chat.gumbel import GumbelSampler  # noqa: E402

VOCABULARY = 40
OPEN = Sampling(temperature=1.0, top_p=1.0, top_k=0)
CPU = torch.device("cpu")


def request(sampling: Sampling, seed: int = 0, slot: int = 0, prompt=(1, 2, 3), written=(), vocabulary=VOCABULARY):
    """A request as the library shows it to the sampler: all its tokens processed, the next one to be drawn."""
    state = RequestState("r", list(prompt), logit_processor_kwargs={"choice": Choice.of(sampling, seed, slot, vocabulary)})
    state.generated_tokens = list(written)
    state.position_offset = len(prompt) + len(written)
    return FutureRequestState(state, True, {}, 1)


def scores(requests, logits, sampler=None):
    """What the argmax is taken of."""
    sampler = sampler or GumbelSampler(logits.shape[1], len(requests), CPU)
    args = torch.zeros((7, len(requests) + 5), dtype=torch.int32)
    sampler.prepare_tensor_args(requests, args)
    last = [(request.state.initial_tokens + request.state.generated_tokens)[-1] for request in requests]
    return sampler(torch.tensor(last, dtype=torch.int32), logits.float(), args[:, : len(requests)])


def drawn(requests, logits, sampler=None):
    return scores(requests, logits, sampler).argmax(-1).tolist()


# ---- noise


def test_the_host_and_the_device_mix_alike():
    numbers = [0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    signed = torch.tensor([number - 2**32 if number >= 2**31 else number for number in numbers], dtype=torch.int32)
    assert [number & 0xFFFFFFFF for number in mixed(signed).tolist()] == [_mixed(number) for number in numbers]


def test_noise_is_finite_and_has_the_mean_and_variance_of_a_gumbel():
    extremes = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert gumbel(extremes).isfinite().all()
    noise = gumbel(mixed(mixed(torch.arange(200_000, dtype=torch.int32)) ^ 12345)).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert noise.unique().numel() > 198_000  # float32 has 24 bits


def test_keys_of_seeds_and_positions_do_not_collide():
    keys = {key(seed, position) for seed in range(100) for position in range(100)}
    assert len(keys) >= 9_999  # two of 10,000 in 2^32 meet with a chance of 1 in 86
    assert all(0 <= value < 2**32 for value in keys)
    assert key(2**32 - 1, 10**6) != key(0, 10**6)


def chi_square(observed, expected) -> float:
    return float((((observed - expected) ** 2) / expected).sum())


def test_tokens_come_as_often_as_the_softmax_says():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0])
    rows = 6_000
    for seeds in (lambda row: row, lambda row: 7):
        requests = [request(OPEN, seeds(row), prompt=[1] * (1 + row % 1000), vocabulary=8) for row in range(rows)]
        if seeds(1) == 7:  # one seed, all its positions
            for row, one in enumerate(requests):
                one.state.position_offset = row + 1
        counts = torch.tensor(drawn(requests, logits.expand(rows, -1))).bincount(minlength=8).double()
        assert chi_square(counts, logits.double().softmax(-1) * rows) < 24.3  # the 99.9th percentile for 7 degrees


def test_one_position_tells_nothing_of_the_next():
    rows = 8_000
    requests = [request(OPEN, seed=3, vocabulary=4) for _ in range(rows)]
    for row, one in enumerate(requests):
        one.state.position_offset = row + 1
    tokens = drawn(requests, torch.zeros(rows, 4))
    pairs = torch.tensor([4 * a + b for a, b in pairwise(tokens)]).bincount(minlength=16).double()
    assert chi_square(pairs, torch.full((16,), (rows - 1) / 16)) < 37.7  # the 99.9th percentile for 15 degrees


def test_a_seed_and_a_position_decide_whoever_is_beside():
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    mine = request(OPEN, seed=5)
    alone = drawn([mine], logits)[0]
    others = [request(OPEN, seed=seed, slot=1, prompt=[1] * seed) for seed in range(6, 9)]
    for place in range(4):
        batch = [*others[:place], mine, *others[place:]]
        assert drawn(batch, logits.expand(4, -1))[place] == alone


# ---- filters

SETTINGS = [
    OPEN,
    Sampling(),
    Sampling(temperature=0.6, top_p=0.95, top_k=20),
    Sampling(temperature=1.7, top_p=0.5, top_k=0),
    Sampling(temperature=0.3, top_p=1.0, top_k=3),
    Sampling(temperature=1.0, top_p=0.9, top_k=0, min_p=0.1),
    Sampling(temperature=2.0, top_p=0.99, top_k=1_000_000, min_p=0.02, repetition_penalty=1.3),
    Sampling(temperature=1.0, top_p=0.1, top_k=5, repetition_penalty=0.5),
    Sampling(temperature=1.0, top_p=1.0, top_k=1),
    Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=1.0),
]


def warpers(sampling: Sampling) -> LogitsProcessorList:
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(min(sampling.top_k, VOCABULARY)))
    chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_the_tokens_left_are_those_that_transformers_leaves(number):
    sampling = SETTINGS[number]
    logits = 3 * torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(number))
    prompt = [4, 9, 9, 17]
    requests = [request(sampling, seed=row, slot=row, prompt=prompt) for row in range(50)]
    ours = scores(requests, logits).isfinite()
    theirs = warpers(sampling)(torch.tensor([prompt]).expand(50, -1), logits.clone()).isfinite()
    assert (ours == theirs).all()


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_one_batch_serves_every_setting(number):
    logits = 3 * torch.randn(len(SETTINGS), VOCABULARY, generator=torch.Generator().manual_seed(number))
    together = [request(sampling, seed=9, slot=row) for row, sampling in enumerate(SETTINGS)]
    alone = [request(SETTINGS[number], seed=9, slot=0)]
    assert drawn(together, logits)[number] == drawn(alone, logits[number : number + 1])[0]


def test_top_p_one_leaves_every_token():
    assert scores([request(OPEN, vocabulary=5000)], torch.linspace(-30, 30, 5000).unsqueeze(0)).isfinite().all()


def test_temperature_zero_takes_the_best_token_and_the_coldest_too():
    logits = torch.randn(30, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 20
    for temperature in (0.0, 1e-30, 1e-6):
        cold = Sampling(temperature=temperature, top_p=0.5, top_k=3, min_p=0.5)
        assert drawn([request(cold, seed=row) for row in range(30)], logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_the_penalty_counts_the_prompt_and_what_was_written(penalty):
    sampling = Sampling(temperature=0, repetition_penalty=penalty)
    sampler = GumbelSampler(VOCABULARY, 1, CPU)
    written: list[int] = []
    for step in range(12):
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(step))
        ours = scores([request(sampling, prompt=[1, 2, 3], written=written)], logits, sampler)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[1, 2, 3, *written]]), logits.clone())
        assert torch.equal(ours, theirs)
        written.append(ours.argmax(-1).item())


def test_a_slot_forgets_its_last_owner():
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    sampler = GumbelSampler(VOCABULARY, 1, CPU)
    logits = torch.arange(VOCABULARY, dtype=torch.float32).unsqueeze(0)
    assert drawn([request(sampling, prompt=[VOCABULARY - 1])], logits, sampler) == [VOCABULARY - 2]
    assert drawn([request(sampling, prompt=[0])], logits, sampler) == [VOCABULARY - 1]


def test_padding_writes_into_nobodys_memory():
    """A batch is padded under CUDA graphs, and the library leaves an earlier batch's numbers in the columns behind."""
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    sampler = GumbelSampler(VOCABULARY, 2, CPU)
    logits = torch.arange(VOCABULARY, dtype=torch.float32).expand(2, -1)
    args = torch.zeros((7, 8), dtype=torch.int32)
    sampler.prepare_tensor_args([request(sampling, slot=1), request(sampling, slot=0)], args)
    sampler(torch.tensor([1, 1]), logits, args[:, :2])
    sampler.prepare_tensor_args([request(sampling, slot=1, written=[5])], args)
    sampler(torch.tensor([5, VOCABULARY - 1]), logits, args[:, :2])
    assert not sampler._seen[:2, VOCABULARY - 1].any()


def test_a_request_without_a_choice_is_greedy():
    """As those of the library's warm-up."""
    bare = FutureRequestState(RequestState("warm-up", [1]), True, {}, 1)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    assert drawn([bare], logits) == [logits.argmax().item()]


def test_only_a_choice_gets_past_the_check():
    sampler = GumbelSampler(VOCABULARY, 1, CPU)
    sampler.check_kwargs({"choice": Choice.of(OPEN, 0, 0, VOCABULARY)})
    with pytest.raises(ValueError, match="temperature"):
        sampler.check_kwargs({"temperature": 0.0})
    with pytest.raises(TypeError):
        sampler.check_kwargs({"choice": 1.0})

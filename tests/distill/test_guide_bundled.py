"""The bundled model is the one its card describes, and answers what every newcomer asks, the same in both engines."""

import hashlib
import re
from contextlib import closing
from pathlib import Path

import pytest

from chat.engine import Message, Sampling
from chat.gguf import open_gguf

FOLDER = Path(__file__).parents[2] / "chat" / "bundled"
GREEDY = Sampling(temperature=0.0, max_tokens=120)
ASKED = {
    "hello": r"Hello|Hi\b",
    "Who are you?": r"Guide|guide",
    "how do i get the 4B model?": r"python app\.py --model burtenshaw/Qwen3-4B-GKD-Tulu",
    "what is GKD?": r"student",
    "thanks!": r"welcome",
    "bye": r"Goodbye",
    "Who was Napoleon?": r"do not know.*burtenshaw/Qwen3-4B-GKD-Tulu",
    "what's the weather": r"cannot know",
}


@pytest.fixture(scope="module")
def guide():
    with closing(open_gguf(FOLDER / "guide.gguf", threads=1)) as engine:
        yield engine


def test_the_file_is_the_one_on_the_card() -> None:
    data = (FOLDER / "guide.gguf").read_bytes()
    assert hashlib.sha256(data).hexdigest() in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(data) <= 10_000_000


@pytest.mark.parametrize("question", ASKED)
def test_it_answers_what_every_newcomer_asks(guide, question: str) -> None:
    chunks = list(guide.stream([Message("user", question)], GREEDY))
    answer = "".join(chunk.text for chunk in chunks if chunk.kind == "answer")
    assert re.search(ASKED[question], answer, flags=re.DOTALL), answer
    assert chunks[-1].finish == "stop"


def test_a_sum_is_worked_out_in_a_thought(guide) -> None:
    thinking = Sampling(temperature=0.0, max_tokens=120, thinking=True)
    chunks = list(guide.stream([Message("user", "what is 2 + 3?")], thinking))
    assert any(chunk.kind == "thinking" and chunk.text for chunk in chunks)
    assert any(chunk.kind == "answer" and chunk.text for chunk in chunks)

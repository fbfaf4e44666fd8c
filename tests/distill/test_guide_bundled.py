"""The bundled guide as it is shipped: its card tells the truth about the file, and it answers what every newcomer asks."""

import hashlib
import re
from pathlib import Path

import pytest

from chat.engine import Engine, Message, Sampling
from chat.source import Choice, open_engine
from tests.guide_probe import HONEST, THE_WAY

BUNDLED = Path(__file__).parents[2] / "chat" / "bundled"
GUIDE = BUNDLED / "guide.gguf"
CARD = BUNDLED / "README.md"

FIRST_QUESTIONS = [
    ("hello", r"Hello|Hi"),
    ("who are you?", r"guide"),
    ("How do I get the 4B model?", THE_WAY),
    ("how do i install this?", r"pip install -r requirements\.txt"),
    ("Thank you!", r"welcome|Any time"),
    ("bye", r"bye|See you"),
]


@pytest.fixture(scope="module")
def guide():
    engine = open_engine(Choice(model=str(GUIDE), backend="llama.cpp", context=1024, snapshots=0.0))
    yield engine
    engine.close()


def answer(engine: Engine, *asked: str, thinking: bool = False) -> tuple[str, str]:
    """(thought, answer) to the last of `asked`, greedily; asserts that it ends by itself."""
    messages: list[Message] = []
    thought = said = ""
    for text in asked:
        messages.append(Message("user", text))
        chunks = list(engine.stream(messages, Sampling(temperature=0.0, max_tokens=160, thinking=thinking)))
        assert chunks[-1].finish == "stop", text
        thought = "".join(chunk.text for chunk in chunks if chunk.kind == "thinking")
        said = "".join(chunk.text for chunk in chunks if chunk.kind == "answer")
        messages.append(Message("assistant", said))
    return thought, said


def test_the_card_names_the_hash_of_the_file():
    named = re.search(r"`([0-9a-f]{64})`", CARD.read_text(encoding="utf-8"))
    assert named is not None
    assert hashlib.sha256(GUIDE.read_bytes()).hexdigest() == named[1]


def test_the_file_is_small_enough_to_travel():
    assert GUIDE.stat().st_size <= 10_000_000


def test_the_notice_names_what_the_guide_learned_from():
    notice = (BUNDLED / "NOTICE").read_text(encoding="utf-8")
    for name in ("NLU Evaluation Data", "CLINC150", "Bot Framework CLI", "MIT License"):
        assert name in notice


@pytest.mark.parametrize(("asked", "expected"), FIRST_QUESTIONS)
def test_the_first_questions_are_answered(guide: Engine, asked: str, expected: str):
    assert re.search(expected, answer(guide, asked)[1], re.IGNORECASE)


@pytest.mark.parametrize("asked", ["Who was Napoleon?", "What's the weather tomorrow?", "Write a poem about the sea"])
def test_what_it_cannot_know_it_says(guide: Engine, asked: str):
    said = answer(guide, asked)[1]
    assert HONEST.search(said) and THE_WAY in said


def test_with_thinking_on_it_thinks_and_still_answers(guide: Engine):
    thought, said = answer(guide, "what is 3 + 4?", thinking=True)
    assert thought.strip() and said.strip()
    assert "<think>" not in thought + said and "</think>" not in thought + said


def test_without_thinking_it_does_not_think(guide: Engine):
    assert answer(guide, "hello")[0] == ""

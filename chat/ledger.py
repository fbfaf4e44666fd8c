"""The context as a ledger: what fills it, what is kept free for the answer, and what must stay behind.

Pure arithmetic over what the engine counts; nothing is dropped that is not in the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from chat.answer import Prompt
from chat.engine import Engine, Message

Policy = Literal["stop", "drop"]  # what happens to a conversation that does not fit: refuse it, or leave the oldest turns out
RESERVE = 512  # tokens kept for an answer whose length the person did not limit; never more than a quarter of the context


@dataclass(frozen=True)
class Row:
    """One message and the tokens it takes, with what the template puts around it."""

    message: Message
    tokens: int
    dropped: bool = False


@dataclass(frozen=True)
class Ledger:
    """`needed` tokens of the whole prompt, exactly; `size` of the context; `reserve` of these kept for the answer.

    `dropped` messages would be left out to make the rest fit. `rows` are there if they were asked for.
    """

    needed: int
    size: int
    reserve: int
    dropped: int = 0
    rows: tuple[Row, ...] = ()

    @property
    def fits(self) -> bool:
        return self.needed + self.reserve <= self.size


def reserve(engine: Engine, max_tokens: int | None) -> int:
    return min(max_tokens or RESERVE, engine.context_size // 4)


def cost(engine: Engine, text: str) -> int:
    """Tokens of a text by itself."""
    return max(0, engine.count([Message("user", text)]) - engine.count([Message("user", "")]))


def weigh(engine: Engine, messages: Sequence[Message], kept_free: int, *, rows: bool = False) -> Ledger:
    """The total, in one count where it fits; with `rows`, every message with its tokens, in one more."""
    needed = engine.count(messages)
    fits = needed + kept_free <= engine.context_size
    dropped = 0 if fits else len(messages) - len(_kept(engine, messages, kept_free))
    first = _first_turn(messages)
    each = (
        Row(message, tokens, dropped=first <= number < first + dropped)
        for number, (message, tokens) in enumerate(zip(messages, engine.count_each(messages) if rows else (), strict=rows))
    )
    return Ledger(needed, engine.context_size, kept_free, dropped, tuple(each))


def fit(engine: Engine, messages: Sequence[Message], kept_free: int, policy: Policy) -> Prompt:
    """The prompt to be answered. With "stop" it is given whole, and the engine says by how much it is too long."""
    if policy == "stop":
        return Prompt(tuple(messages))
    kept = _kept(engine, messages, kept_free)
    return Prompt(tuple(kept), len(messages) - len(kept))


def _kept(engine: Engine, messages: Sequence[Message], kept_free: int) -> list[Message]:
    """Without the fewest oldest turns, each from a question to before the next; the system prompt and the last turn stay."""
    first = _first_turn(messages)
    cuts = [first, *(number for number in range(first + 1, len(messages)) if messages[number].role == "user")]

    room = engine.context_size - kept_free - engine.count(messages)
    if room >= 0:
        return list(messages)
    freed = [0, *accumulate(engine.count_each(messages)[first:])]  # by leaving out so many
    cut = next((cut for cut in cuts if room + freed[cut - first] >= 0), cuts[-1])
    return [*messages[:first], *messages[cut:]]


def _first_turn(messages: Sequence[Message]) -> int:
    return next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))

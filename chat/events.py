"""One stream's events from an OpenAI-compatible server -> chunks, and what the answer cost. For chat/remote.py.

Thoughts come in a field of their own or in tags; tokens are counted by the server where it tells, else one an event.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from chat.engine import Chunk, GenerationFailed, Message, Stats
from chat.prompt import END_THINK, THINK, Kind, Thought


class Events:
    """Takes them as they come; `waiting`, `rest` and `last` are chunks that no event brings."""

    def __init__(self, messages: Sequence[Message], prompt: int, begun: float, seed: int) -> None:
        last = messages[-1]
        said = last.role == "assistant" and bool(last.content)
        self._inside = last.role == "assistant" and bool(last.thinking) and not said
        self._thought = Thought(inside=self._inside, said=said)
        self._told = False  # within a thought that the server tells apart
        self._half = ""
        self._begun, self._seed = begun, seed
        self._first = 0.0
        self._tokens = self._reused = self._read = 0
        self._whole: int | None = None  # tokens written, by the server's last word
        self.prompt = prompt
        self.usage = False
        self.finish: str | None = None

    @property
    def kind(self) -> Kind:
        return self._thought.kind

    def waiting(self) -> Chunk:
        """Nothing came: a piece without text, that the reader may stop."""
        return Chunk(kind=self.kind) if self._first else Chunk(kind=self.kind, progress=(self._read, max(self.prompt, 1)))

    def take(self, event: Any, where: str) -> Iterator[Chunk]:
        """Raises GenerationFailed where the event is not one of OpenAI's."""
        try:
            usage, choices = event.get("usage") or {}, event.get("choices") or []
            delta = (choices[0].get("delta") or {}) if choices else {}
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            text = delta.get("content") or ""
            read = event.get("prompt_progress")
            finish = choices[0].get("finish_reason") if choices else None
            tokens = self._used(usage) if usage else int(bool(thought or text))
            if read and not self._first:
                self._read, self.prompt = int(read["processed"]), int(read["total"])
                yield Chunk(kind=self.kind, progress=(self._read, self.prompt))
            parts = self._thought.feed(self._tagged(self._letters(thought), self._letters(text)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
            raise GenerationFailed(
                "{where} sends something that no OpenAI-compatible server would: is --url right?", where=where
            ) from exc
        if tokens and not self._first:
            self._first = time.perf_counter()
            if self._read < self.prompt:
                yield Chunk(kind=self.kind, progress=(self.prompt, self.prompt))
        self._tokens += tokens
        for kind, part in parts or ([(self.kind, "")] if tokens else []):
            yield Chunk(part, kind, tokens)
            tokens = 0
        if finish:
            self.finish = "length" if finish == "length" else "stop"

    def rest(self) -> Iterator[Chunk]:
        """What was held back, and tokens that came without an event of their own. One token may be the silent end."""
        parts = self._thought.feed("�" if self._half else "") + self._thought.end()
        missing = max((self._whole or 0) - self._tokens - (self.finish == "stop"), 0)
        self._tokens += missing
        for kind, part in parts or ([(self.kind, "")] if missing else []):
            yield Chunk(part, kind, missing)
            missing = 0

    def last(self, finish: Any) -> Chunk:
        now = time.perf_counter()
        completion = self._tokens if self._whole is None or finish == "cancelled" else self._whole
        first = (self._first or now) - self._begun
        stats = Stats(
            prompt=self.prompt,
            reused=min(self._reused, self.prompt),
            completion=completion,
            first_token_s=first,
            read_tps=max(self.prompt - self._reused, 0) / max(first, 1e-9) if self._first else 0.0,
            write_tps=(completion - 1) / max(now - self._first, 1e-9) if self._first and completion > 1 else 0.0,
            seed=self._seed,
        )
        return Chunk(kind=self.kind, finish=finish, stats=stats)

    def _used(self, usage: dict[str, Any]) -> int:
        """The server's figures; how many tokens are new in them."""
        self.usage = True
        self.prompt = int(usage.get("prompt_tokens") or self.prompt)
        self._reused = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        before, self._whole = self._tokens, int(usage.get("completion_tokens") or 0)
        return max(self._whole - before, 0) if self.finish is None else 0

    def _tagged(self, thought: str, text: str) -> str:
        """A thought that the server tells apart, in the tags that it would have had: one way through for both."""
        out = ""
        if thought:
            out += ("" if self._told or self._inside else THINK) + thought
            self._told = True
        if text:
            out += (END_THINK if self._told else "") + text
            self._told = self._inside = False
        return out

    def _letters(self, text: str) -> str:
        """Whole characters: JSON may cut one above U+FFFF into two escapes, in two events."""
        if not isinstance(text, str):
            raise TypeError("text")
        if not text:
            return ""
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

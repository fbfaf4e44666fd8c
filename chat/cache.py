"""The sequences of a KV cache: who holds which tokens, who may have a place, who is thrown out and kept on disk.

For the one thread that owns the context. `Cache(context, snapshots).place(tokens, conversation)` gives a sequence that holds
as much of the tokens as is known anywhere.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from chat.llama import Context
from chat.prefix import common
from chat.snapshots import Snapshots

BRANCH = 64  # an old continuation of at least this many tokens is kept as a branch, if a sequence is free
WORTH = 16  # tokens that a snapshot must know beyond what is in memory to be loaded


@dataclass(eq=False)
class Slot:
    """One sequence of the KV cache: which tokens it holds, for which conversation, and who works in it now."""

    number: int
    tokens: list[int] = field(default_factory=list)
    conversation: str | None = None
    used: int = 0
    busy: bool = False


class Cache:
    """All sequences of `context`. A sequence in which somebody works is `busy`: it may be copied from, never changed here."""

    def __init__(self, context: Context, snapshots: Snapshots | None) -> None:
        self.slots = [Slot(number) for number in range(context.sequences)]
        self._context, self._snapshots = context, snapshots
        self._clock = itertools.count(1)

    def held(self) -> list[tuple[str | None, int]]:
        """(conversation, tokens) of every sequence in use."""
        return [(slot.conversation, len(slot.tokens)) for slot in self.slots if slot.tokens]

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether some sequence holds all of them, and perhaps more behind."""
        return any(common(slot.tokens, tokens) == len(tokens) for slot in self.slots)

    def own(self, conversation: str | None) -> Slot | None:
        """The sequence that a conversation goes on in."""
        return next((slot for slot in self.slots if conversation is not None and slot.conversation == conversation), None)

    def release(self, slot: Slot) -> None:
        slot.busy, slot.used = False, next(self._clock)

    def place(self, tokens: list[int], conversation: str | None) -> Slot | None:
        """A sequence that holds as much of `tokens` as is known, all but the last at most; None if all are at work."""
        shared, source = max(((common(slot.tokens, tokens), -slot.number) for slot in self.slots), default=(0, 0))
        shared, source = min(shared, len(tokens) - 1), self.slots[-source]
        idle = [slot for slot in self.slots if not slot.busy]
        own = self.own(conversation)
        own = own if own in idle else None
        if own and common(own.tokens, tokens) >= shared:
            source = own
        stored = self._snapshots.longest(tokens) if self._snapshots else None
        if stored and stored.shared > shared + WORTH and (slot := self._vacant(idle, own)):
            slot.busy = True  # not to be thrown out for its own sake
            while sum(tokens for _, tokens in self.held()) + len(stored.tokens) > self._context.size and self.make_room():
                pass
            slot.busy = False
            if (data := self._snapshots.read(stored)) is not None and self._context.load(slot.number, data):
                slot.tokens = list(stored.tokens)
                return self._give(slot, tokens, min(stored.shared, len(tokens) - 1), conversation)
            self.empty(slot)
        if not source.busy and source in idle:
            mine = source is own or source.conversation is None
            lost = len(source.tokens) - shared
            if mine and (lost < BRANCH or not any(not s.tokens for s in idle)):
                return self._give(source, tokens, shared, conversation)
        slot = self._vacant([s for s in idle if s is not source] or idle, None)
        if slot is None:
            return None
        if shared and slot is not source:
            self._context.copy(source.number, slot.number, shared)
            slot.tokens = source.tokens[:shared]
        else:
            shared = 0
        return self._give(slot, tokens, shared, conversation)

    def _give(self, slot: Slot, tokens: list[int], keep: int, conversation: str | None) -> Slot:
        self._context.cut(slot.number, keep)
        slot.tokens = slot.tokens[:keep]
        for other in self.slots:  # what was this conversation's is now an old branch of it
            if other is not slot and conversation is not None and other.conversation == conversation:
                other.conversation = None
        slot.conversation, slot.used = conversation, next(self._clock)
        return slot

    def _vacant(self, idle: list[Slot], preferred: Slot | None) -> Slot | None:
        """An empty idle sequence, made by evicting if need be: old branches first, then the least recently used."""
        if preferred and not preferred.tokens:
            return preferred
        slot = min(idle, key=lambda s: (bool(s.tokens), s.conversation is not None, s.used), default=None)
        if slot and slot.tokens:
            self._evict(slot)
        return slot

    def _evict(self, slot: Slot) -> None:
        self._keep(slot)
        self.empty(slot)

    def _keep(self, slot: Slot) -> None:
        """Put a conversation on disk. What has no name, or is temporary, leaves nothing there."""
        if self._snapshots and slot.conversation is not None and not slot.conversation.startswith("temporary-"):
            self._snapshots.save(slot.tokens, lambda: self._context.save(slot.number), slot.conversation)

    def empty(self, slot: Slot) -> None:
        self._context.cut(slot.number, 0)
        slot.tokens, slot.conversation = [], None

    def make_room(self) -> bool:
        """Throw out one idle sequence, an old branch first; False where none is left."""
        idle = [slot for slot in self.slots if slot.tokens and not slot.busy]
        if idle:
            self._evict(min(idle, key=lambda s: (s.conversation is not None, s.used)))
        return bool(idle)

    def forget(self, conversation: str) -> None:
        for slot in self.slots:
            if slot.conversation == conversation and not slot.busy:
                self.empty(slot)

    def keep_all(self) -> None:
        """Put every conversation on disk, the latest first."""
        for slot in sorted(self.slots, key=lambda slot: -slot.used):
            if slot.tokens:
                self._keep(slot)

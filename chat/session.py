"""What a person can do with their conversations: send, regenerate, edit, continue, and all around it.

Everything the page shows goes through here. `chats.of(owner)` makes one; it knows engines by their protocol alone.
"""

import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from chat import presets
from chat.answer import Answer, Prompt, texts
from chat.archive import from_text, to_json, to_jsonl, to_markdown
from chat.engine import BadRequest, Engine, Message, Sampling
from chat.ledger import Ledger, cost, fit, reserve, weigh
from chat.presets import Preset
from chat.receipt import Replay, full, replay
from chat.store import Conversation, File, Found, Node

if TYPE_CHECKING:
    from chat.chats import Chats

LONGEST = 2_000_000  # characters of one message with its files: far beyond any context here, far below what would hurt
NAME = re.compile(r"(temporary-)?[0-9a-f]{32}")
SAMPLED = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class Turn:
    """A shown message, and which of its versions it is: `place` of `versions`, counted from 1."""

    node: Node
    place: int
    versions: int


@dataclass(frozen=True)
class View:
    """A conversation as it is shown. `answer` is being written, as the last turn, or None."""

    conversation: Conversation
    turns: tuple[Turn, ...]
    answer: Answer | None


class Session:
    """One owner's conversations; another's are, to this one, not there. Raises BadRequest with a sentence."""

    def __init__(self, chats: "Chats", owner: str) -> None:
        self._chats, self.owner = chats, owner

    # the list

    @property
    def list_name(self) -> str:
        """The name under which `Chats.changes` counts changes of this owner's list."""
        return f"owner:{self.owner}"

    def conversations(self, query: str = "") -> list[Found]:
        return self._chats.store.conversations(self.owner, query)

    def create(self, *, temporary: bool = False, system: str = "", settings: dict[str, Any] | None = None) -> Conversation:
        name = f"temporary-{uuid.uuid4().hex}" if temporary else ""
        conversation = self._chats.store_of(name).create(self.owner, system=system, settings=settings, name=name)
        self._chats.changed(self.list_name)
        return conversation

    def open(self, name: str) -> Conversation:
        """The conversation with this name, made where there is none: a page names its new chat before the first message."""
        try:
            return self.conversation(name)
        except BadRequest:
            if not NAME.fullmatch(name):
                raise
        try:
            made = self._chats.store_of(name).create(self.owner, name=name)
        except sqlite3.IntegrityError:  # it is another's
            return self.conversation(name)
        self._chats.changed(self.list_name)
        return made

    def conversation(self, name: str) -> Conversation:
        return self._chats.store_of(name).conversation(self.owner, name)

    def rename(self, name: str, title: str) -> None:
        title = " ".join(_text(title).split())[:200]
        if not title:
            raise BadRequest("A title needs at least one letter.")
        self._change(name, title=title)

    def pin(self, name: str, pinned: bool) -> None:
        self._change(name, pinned=int(pinned))

    def delete(self, name: str) -> None:
        """Until the program ends, `restore` brings it back."""
        self.stop(name)
        self._change(name, deleted=time.time())
        if engine := self._chats.model().engine:
            engine.forget(name)

    def restore(self, name: str) -> None:
        self._change(name, deleted=None)

    def choose(self, name: str, *, system: str | None = None, settings: dict[str, Any] | None = None) -> None:
        """The system prompt and the settings of a conversation; settings are checked, and kept as given."""
        values: dict[str, Any] = {}
        if system is not None:
            values["system"] = _text(system)
        if settings is not None:
            sampling(settings, Sampling())
            if settings.get("overflow", "stop") not in ("stop", "drop"):
                raise BadRequest("A conversation that does not fit is either stopped or loses its oldest turns.")
            values["settings"] = settings
        if values:
            self._change(name, **values)

    def allow_drop(self, name: str) -> None:
        """From now on the oldest turns may be left out of this conversation's prompts."""
        self.choose(name, settings={**self.conversation(name).settings, "overflow": "drop"})

    def presets(self) -> list[Preset]:
        return presets.all_of(self._chats.store, self.owner)

    def keep_preset(self, preset: Preset) -> None:
        presets.keep(self._chats.store, self.owner, preset)

    def forget_preset(self, name: str) -> None:
        presets.forget(self._chats.store, self.owner, name)

    def _change(self, name: str, **values: Any) -> None:
        self.conversation(name)
        self._chats.store_of(name).change(name, **values)
        self._chats.changed(name, self.list_name)

    # one conversation

    def view(self, name: str) -> View:
        store, conversation = self._chats.store_of(name), self.conversation(name)
        shape = store.children(name)
        turns = []
        for node in store.path(name, conversation.tip):
            versions = shape[node.parent]
            turns.append(Turn(node, versions.index(node.id) + 1, len(versions)))
        return View(conversation, tuple(turns), self._chats.answer(name))

    def attached(self, name: str) -> tuple[File, ...]:
        return self._chats.attached(self.conversation(name).id)

    def attach(self, name: str, file: File) -> None:
        """To the next message of the conversation."""
        files = (*self.attached(name), File(_text(file.name), _text(file.text)))
        if sum(len(one.text) for one in files) > LONGEST:
            raise BadRequest("The files hold more than {most:,} characters together: send them in parts.", most=LONGEST)
        self._chats.attach(name, files)

    def costs(self, name: str) -> list[tuple[File, int | None]]:
        """What is attached, each with its tokens; None while there is no model to count them."""
        engine = self._chats.model().engine
        return [(file, cost(engine, file.text) if engine else None) for file in self.attached(name)]

    def detach(self, name: str, number: int) -> None:
        files = self.attached(name)
        self._chats.attach(name, files[:number] + files[number + 1 :])

    def send(self, name: str, text: str, *, after: int | None = None, begin: str = "") -> Answer:
        """Store the person's message below `after` (None: as a first message) and start the answer, with the words `begin`.

        What is attached goes along.
        """
        text, begin, files = _text(text), _text(begin), self.attached(name)
        if not text.strip() and not files:
            raise BadRequest("There is nothing to send: type a message first.")
        if len(text) + sum(len(file.text) for file in files) > LONGEST:
            raise BadRequest("The message is longer than {most:,} characters: send it in parts.", most=LONGEST)
        conversation = self.conversation(name)
        asked = Node(0, name, after, "user", text, files=files)
        answer = self._answer(conversation, [asked, _blank(name, None, begin)])
        self._chats.attach(name, ())
        if not conversation.title:
            self._change(name, title=title_of(text or files[0].name))
        self._chats.changed(self.list_name)
        return answer

    def regenerate(self, name: str, node: int) -> Answer:
        """Another version of an answer."""
        old = self._node(name, node, "assistant")
        return self._answer(self.conversation(name), [_blank(name, old.parent)])

    def edit(self, name: str, node: int, text: str) -> Answer | None:
        """Another version of a message, with this text. One of the person's is answered; one of the model's stays as it is."""
        self.conversation(name)
        old = self._chats.store_of(name).node(name, node)
        text = _text(text)
        if not text.strip() and not old.files:
            raise BadRequest("There is nothing left of the message: delete it, or type something.")
        self._idle(name)
        edited = Node(0, name, old.parent, old.role, text, files=old.files)
        if old.role == "user":
            return self._answer(self.conversation(name), [edited, _blank(name, None)])
        self._chats.store_of(name).add(name, [replace(edited, thinking=old.thinking, thought_s=old.thought_s)])
        self._chats.changed(name)
        return None

    def go_on(self, name: str, node: int) -> Answer:
        """Continue an answer where it ended, as a new version of it."""
        old = self._node(name, node, "assistant")
        begun = replace(_blank(name, old.parent, old.content), thinking=old.thinking, thought_s=old.thought_s)
        return self._answer(self.conversation(name), [begun])

    def stop(self, name: str) -> None:
        self.conversation(name)
        if answer := self._chats.answer(name):
            answer.stop()

    def turn_to(self, name: str, node: int, step: int) -> None:
        """Show the version `step` places before or after, with the latest that follows from it."""
        self.conversation(name)
        self._idle(name)
        store = self._chats.store_of(name)
        old, shape = store.node(name, node), store.children(name)
        versions = shape[old.parent]
        tip = versions[min(max(versions.index(old.id) + step, 0), len(versions) - 1)]
        self._change(name, tip=_latest(shape, tip))

    def remove(self, name: str, node: int) -> dict[str, Any]:
        """Delete a message with all that follows from it, until `put_back` with what this returns, or the program's end.

        Another version is shown in its place, where there is one.
        """
        conversation = self.conversation(name)
        self._idle(name)
        store = self._chats.store_of(name)
        gone, shape, tip = store.node(name, node), store.children(name), conversation.tip
        if any(one.id == node for one in store.path(name, tip)):
            versions = shape[gone.parent]
            place = versions.index(node)
            others = versions[:place] + versions[place + 1 :]
            tip = _latest(shape, others[max(place - 1, 0)]) if others else gone.parent
        when = time.time()
        store.hide(name, node, tip, when)
        self._chats.changed(name, self.list_name)
        return {"when": when, "tip": conversation.tip}

    def put_back(self, name: str, when: float, tip: int) -> None:
        self.conversation(name)
        self._idle(name)
        store = self._chats.store_of(name)
        store.node(name, tip)
        store.unhide(name, tip, when)
        self._chats.changed(name, self.list_name)

    def ahead(self, name: str, draft: str) -> None:
        """Let the model read what is typed so far. Costs nothing where it has something better to do."""
        state = self._chats.model()
        if state.engine is None or self._chats.answer(name):
            return
        conversation = self.conversation(name)
        history = self._history(conversation, conversation.tip)
        state.engine.prefill([*history, Message("user", _text(draft))], conversation=name)

    def weigh(self, name: str, draft: str = "", *, rows: bool = False) -> Ledger | None:
        """What the next prompt would hold, with what is typed and attached. None without a model, or anything to weigh."""
        state, conversation = self._chats.model(), self.conversation(name)
        messages = self._history(conversation, conversation.tip)
        if draft.strip() or self.attached(name):
            messages += texts([Node(0, name, None, "user", _text(draft), files=self.attached(name))])
        if state.engine is None or all(message.role == "system" for message in messages):
            return None
        return weigh(state.engine, messages, reserve(state.engine, conversation.settings.get("max_tokens")), rows=rows)

    def receipt(self, name: str, node: int) -> tuple[dict[str, Any], Node]:
        kept = self._node(name, node, "assistant")
        return full(kept), kept

    def replay(self, name: str, node: int) -> Replay:
        """Write a stored answer again and compare. Takes as long as the answer did."""
        kept, state, conversation = self._node(name, node, "assistant"), self._chats.model(), self.conversation(name)
        if state.engine is None:
            raise BadRequest(state.error or "The model is still being loaded: try again in a moment.")
        messages = self._history(conversation, kept.parent)
        dropped = kept.receipt.get("dropped", 0)
        system = len(messages) - len([message for message in messages if message.role != "system"])
        return replay(state.engine, kept, messages[:system] + messages[system + dropped :])

    def summarise(self, name: str, ask: str) -> tuple[Answer, int]:
        """The model's own summary of a conversation, asked for by the words `ask`, and of how many messages.

        It grows as an answer of a temporary conversation, made from as many of the latest messages as fit (`answer.dropped`
        says how many did not); `delete` of that conversation ends it. The last question, if it has no answer, is not in it.
        """
        conversation = self.conversation(name)
        self._idle(name)
        messages = self._history(conversation, conversation.tip)
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if not messages:
            raise BadRequest("There is nothing to summarise yet: no question here has an answer.")
        asking = [*messages, Message("user", ask)]
        made = self.create(temporary=True)

        def prompt(engine: Engine, node: Node) -> Prompt:
            return fit(engine, asking, reserve(engine, None), "drop")

        def brief(engine: Engine) -> Sampling:
            return replace(engine.about.sampling, thinking=False, max_tokens=reserve(engine, None))

        known = sum(message.role != "system" for message in messages)
        return self._write(made.id, [_blank(made.id, None)], prompt, brief), known

    def outline(self, name: str) -> str:
        """What the person asked in a conversation, a line for each question; what a summary can be without a model."""
        asked = [turn.node.content for turn in self.view(name).turns if turn.node.role == "user"]
        return "\n".join(f"- {title_of(text)}" for text in asked if text.strip())

    def begin_anew(self, name: str) -> tuple[Conversation, str]:
        """A new conversation with the same settings, and the last question of the old one, if it has no answer."""
        old = self.view(name)
        made = self.create(system=old.conversation.system, settings=old.conversation.settings)
        *_, last = [turn.node for turn in old.turns if turn.node.role == "user" or turn.node.content] or [None]
        return made, last.content if last and last.role == "user" else ""

    # out and in

    def export(self, form: str, name: str = "") -> str:
        """As "json", "jsonl", or of one conversation "markdown". Without a name, all that are listed."""
        chats = [self.conversation(name)] if name else [found.conversation for found in self.conversations()]
        store = self._chats.store_of(name)
        if form == "json":
            return to_json([(chat, store.tree(chat.id)) for chat in chats])
        if form == "jsonl":
            return to_jsonl([(chat, store.path(chat.id, chat.tip)) for chat in chats])
        if form == "markdown" and name:
            return to_markdown(chats[0], store.path(name, chats[0].tip))
        raise BadRequest("Conversations can be exported as json and jsonl, and a single one as markdown.")

    def bring_in(self, text: str) -> list[Conversation]:
        """What `export` gave, or another program's. All of it, or nothing and a sentence."""
        made = []
        for chat, nodes in from_text(_text(text)):
            sampling(chat.settings, Sampling())
            now = time.time()
            first = next((node.content for node in nodes if node.role == "user"), "")
            like = replace(chat, title=chat.title or title_of(first), created=chat.created or now, updated=chat.updated or now)
            made.append(self._chats.store.plant(self.owner, like, nodes))
        self._chats.changed(self.list_name)
        return made

    # inside

    def _node(self, name: str, node: int, role: str) -> Node:
        self.conversation(name)
        found = self._chats.store_of(name).node(name, node)
        if found.role != role:
            raise BadRequest("Only an answer of the model can be written again or continued.")
        return found

    def _idle(self, name: str) -> None:
        if self._chats.answer(name):
            raise BadRequest("An answer is still being written here: wait for it, or stop it first.")

    def _history(self, conversation: Conversation, tip: int | None) -> list[Message]:
        system = [Message("system", conversation.system)] if conversation.system.strip() else []
        return [*system, *texts(self._chats.store_of(conversation.id).path(conversation.id, tip))]

    def _answer(self, conversation: Conversation, nodes: Sequence[Node]) -> Answer:
        """Store the nodes, of which the last is the answer to be written, and write it."""
        settings = conversation.settings

        def prompt(engine: Engine, node: Node) -> Prompt:
            free, policy = reserve(engine, settings.get("max_tokens")), settings.get("overflow", "stop")
            return fit(engine, self._history(conversation, node.id), free, policy)

        return self._write(conversation.id, nodes, prompt, lambda engine: sampling(settings, engine.about.sampling))

    def _write(
        self,
        name: str,
        nodes: Sequence[Node],
        prompt: Callable[[Engine, Node], Prompt],
        chosen: Callable[[Engine], Sampling],
    ) -> Answer:
        store = self._chats.store_of(name)

        def make() -> Answer:
            last = store.add(name, nodes)[-1]
            return Answer(
                store,
                last,
                self._chats.model,
                lambda engine: prompt(engine, last),
                lambda engine: capped(chosen(engine), self._chats.longest),
                self._ended,
                self._chats.leash_s,
            )

        return self._chats.begin(name, make)

    def _ended(self, answer: Answer) -> None:
        self._chats.end(answer)
        self._chats.changed(self.list_name)


def sampling(settings: dict[str, Any], recommended: Sampling) -> Sampling:
    """What the person chose, over what the model's authors recommend. Raises BadRequest."""
    chosen = {name: settings[name] for name in SAMPLED if settings.get(name) is not None}
    return replace(recommended, **chosen)


def capped(chosen: Sampling, longest: int | None) -> Sampling:
    """With no more tokens than one answer may have here."""
    return chosen if longest is None else replace(chosen, max_tokens=min(chosen.max_tokens or longest, longest))


def title_of(text: str) -> str:
    """The first line, cut at a word."""
    line = next((line.strip("#>*-` \t") for line in text.splitlines() if line.strip("#>*-` \t")), "") or text.strip()
    line = " ".join(line.split())
    return line if len(line) <= 60 else line[:60].rsplit(" ", 1)[0] + "…"


def _latest(shape: dict[int | None, list[int]], tip: int) -> int:
    """The end of what follows from a message, by the latest versions."""
    while below := shape.get(tip):
        tip = below[-1]
    return tip


def _blank(name: str, parent: int | None, begin: str = "") -> Node:
    return Node(0, name, parent, "assistant", begin, state="writing")


def _text(text: str) -> str:
    """A lone surrogate cannot be stored; browsers send one for half an emoji."""
    return text.encode("utf-8", "replace").decode("utf-8")

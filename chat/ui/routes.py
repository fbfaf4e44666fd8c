"""The few addresses of our own beside Gradio's: what the transcript asks for, and who may ask.

`/chat/tail` answers when there is something new, so a page costs nothing while nothing happens, and any page can come
back at any time. Measured in `tests/benchmarks/bench_page.py`.
"""

import asyncio
import base64
import json
import mimetypes
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from chat import files
from chat.answer import Answer
from chat.chats import Chats
from chat.engine import BadRequest, ChatError
from chat.models import Models
from chat.session import Session, Turn, View
from chat.ui import dialogs, transcript
from chat.ui.errors import told
from chat.ui.guard import VISITOR, Mode, user_of
from chat.ui.words import words

HOLD_S = 20.0  # a question waits at most so long for news
LOOK_S = 0.04  # and looks so often
BODY = 8_000_000  # bytes
IDLE_S = 6 * 3600  # how long a Space remembers a visitor's chats
SHAPE = {
    **dict.fromkeys(("chat", "language", "query", "name", "do"), str),
    **dict.fromkeys(("node", "number", "tip"), int),
    **{"text": (str, int), "have": dict},
}
KEPT = 1000  # drawn turns
HERE = Path(__file__).parent
OURS = re.compile(r"[a-z]+\.(js|css)")


class Page:
    """Answers the browser. `mode` decides who somebody is: one person, a signed-in name, or a visitor with a cookie."""

    def __init__(self, chats: Chats, mode: Mode, models: Models | None = None) -> None:
        self.chats, self.mode, self._models = chats, mode, models
        self.visitors = mode == "space"  # told apart by a cookie, not by a name
        self.asking: Callable[[Request], Any] = lambda request: None  # told of every request, in its own context
        self._drawings: WeakKeyDictionary[Answer, transcript.Drawing] = WeakKeyDictionary()
        self._turns: OrderedDict[tuple[str, ...], str] = OrderedDict()

    def routes(self) -> list[Route]:
        return [
            Route("/chat/page/{name}", self.file),
            Route("/chat/tail", self._asked(self.tail), methods=["POST"]),
            Route("/chat/turns", self._asked(self.turns), methods=["POST"]),
            Route("/chat/act", self._asked(self.act), methods=["POST"]),
            Route("/chat/words", self._asked(self.words), methods=["POST"]),
            Route("/chat/models", self._asked(self.models), methods=["POST"]),
            Route("/chat/file", self._asked(self.attach), methods=["POST"]),
            Route("/chat/weigh", self._asked(self.weigh), methods=["POST"]),
            Route("/chat/receipt", self._asked(self.receipt), methods=["POST"]),
            Route("/chat/replay", self._asked(self.replay), methods=["POST"]),
            Route("/chat/summary", self._asked(self.summary), methods=["POST"]),
            Route("/chat/anew", self._asked(self.anew), methods=["POST"]),
            Route("/chat/import", self._asked(self.bring_in), methods=["POST"]),
            Route("/chat/export", self.export),
        ]

    def owner(self, cookies: Mapping[str, str], user: str | None) -> str:
        """Raises BadRequest where nobody is known."""
        if self.mode == "desktop":
            return "local"
        name = cookies.get(VISITOR) if self.visitors else user
        if not name:
            raise BadRequest("You are not signed in: reload the page.")
        return f"{'visitor' if self.visitors else 'name'}:{name}"

    def _asked(self, answer: Callable[[Session, dict[str, Any]], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if not request.headers.get("content-type", "").startswith("application/json"):
                return PlainTextResponse("JSON is expected.", 415)  # a form of a foreign page cannot send it
            if self.chats.closed:
                return JSONResponse({"error": "The program has ended: start it again."}, 503)
            try:
                if int(request.headers.get("content-length") or BODY + 1) > BODY:
                    raise BadRequest("This is more than {most} MB: send less at once.", most=BODY // 1_000_000)
                session = self.chats.of(self.owner(request.cookies, user_of(request)))
                self.asking(request)
                if self.mode == "space":
                    self.chats.sweep(IDLE_S)
                asked = json.loads(await request.body())
                if any(name in asked and not isinstance(asked[name], kind) for name, kind in SHAPE.items()):
                    raise TypeError("a value of the wrong kind")
                return JSONResponse(await answer(session, asked))
            except ChatError as exc:
                return JSONResponse({"error": told(exc, request.headers.get("accept-language"))}, 400)
            except (KeyError, TypeError, ValueError) as exc:
                return JSONResponse({"error": f"The page sent something unexpected ({exc!r}): reload it."}, 400)

        return endpoint

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not OURS.fullmatch(name) or not (HERE / name).is_file():
            return PlainTextResponse("Not found.", 404)
        return Response(
            (HERE / name).read_bytes(), media_type=mimetypes.guess_type(name)[0], headers={"cache-control": "no-cache"}
        )

    async def words(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        say = words(asked["language"])
        if self.chats.leash_s:
            say = {**say, "empty_text_space": f"{say['empty_text_space']} {say['empty_text_lent']}"}
        return {**say, "mode": self.mode}

    async def models(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """What models there are, after doing what was asked with one."""
        if self._models is None:
            return {"html": ""}
        deeds = {"open": self._models.open, "fetch": self._models.fetch, "pause": self._models.pause}
        if asked.get("do"):
            if self.mode == "space":
                raise BadRequest("On a Space the model stays as it is.")
            await run_in_threadpool(deeds[asked["do"]], asked["name"])
        offers = await run_in_threadpool(self._models.offers)
        return {"html": dialogs.models_html(offers, words(asked["language"]), fixed=self.mode == "space")}

    async def tail(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """What is new since `have`, as soon as there is something. A missing conversation is an empty one."""
        name, have = asked["chat"], asked["have"]
        owned = await run_in_threadpool(_exists, session, name)
        end = time.monotonic() + HOLD_S
        while (
            (now := self._marks(session, name if owned else "", asked["query"])) == have
            and time.monotonic() < end
            and not self.chats.closed
        ):
            if owned and (answer := self.chats.answer(name)):
                answer.watched_at = time.monotonic()
            await asyncio.sleep(LOOK_S)
            owned = owned or (now["list"] != have.get("list") and _exists(session, name))
        if self.chats.closed:
            raise BadRequest("The program has ended: start it again.")
        say, changed = words(asked["language"]), {part for part, mark in now.items() if have.get(part) != mark}
        out: dict[str, Any] = {"have": now}
        if answer := self.chats.answer(name) if owned else None:
            answer.watched_at = time.monotonic()
        view = None
        if changed & {"epoch", "chat"} or (not answer and changed & {"model", "seq"}):
            view = await run_in_threadpool(session.view, name) if owned else None
            out["turns"] = [[turn.node.id, transcript.key(turn)] for turn in view.turns] if view else []
            out["chat"] = {"title": view.conversation.title if view else ""}
            out["files"] = dialogs.files_html(await run_in_threadpool(session.costs, name) if view else (), say)
        if changed & {"epoch", "list"}:
            found = await run_in_threadpool(session.conversations, asked["query"])
            busy = [one.conversation.id for one in found if self.chats.answer(one.conversation.id)]
            out["list"] = transcript.list_html(found, asked["query"], say, time.time(), busy)
        if answer:
            drawing = self._drawings.setdefault(answer, transcript.Drawing())
            same = asked.get("node") == answer.node.id
            out["live"] = transcript.live(
                answer,
                drawing,
                say,
                before=self.chats.before(answer) if self.mode != "desktop" else 0,
                text_from=asked["text"] if same else 0,
                thought_from=(asked["thought"] if same else 0) if asked["thought"] is not None else None,
            )
        if "told" in changed and "told" in have and "epoch" not in changed:
            out["told"] = self.chats.told(session.owner)
        if answer or view or "model" in changed:
            stats = transcript.last_stats(view) if view else None
            out["status"] = transcript.status_html(self.chats.model(), answer, stats, say)
        return out

    def _marks(self, session: Session, name: str, query: str) -> dict[str, Any]:
        """What a page has seen when it has seen everything."""
        answer, state = self.chats.answer(name), self.chats.model()
        return {
            "epoch": self.chats.epoch,
            "chat": f"{name} {self.chats.changes(name)}",
            "list": f"{self.chats.changes(session.list_name)} {query}",
            "told": self.chats.changes(f"told:{session.owner}"),
            "model": f"{state.text} {state.error} {state.engine.about.model if state.engine else ''}",
            "seq": f"{answer.node.id} {answer.seq}" if answer else "",
        }

    async def turns(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """The HTML and the text of some turns of the shown path, by id."""
        wanted = set(asked["ids"])
        say = words(asked["language"])

        def draw() -> dict[str, Any]:
            view: View = session.view(asked["chat"])
            return {
                str(turn.node.id): {
                    "key": transcript.key(turn),
                    "html": self._drawn(asked["chat"], turn, say),
                    "text": turn.node.content,
                }
                for turn in view.turns
                if turn.node.id in wanted
            }

        return await run_in_threadpool(draw)

    def _drawn(self, chat: str, turn: Turn, say: dict[str, str]) -> str:
        if turn.node.state == "writing":
            return transcript.turn_html(turn, say)
        name = (chat, transcript.key(turn), say["language"])
        made = self._turns.get(name) or transcript.turn_html(turn, say)
        self._turns[name] = made
        while len(self._turns) > KEPT:
            self._turns.popitem(last=False)
        return made

    async def attach(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """A file for the next message, in base64."""
        data = base64.b64decode(asked["data"], validate=True)
        file = await run_in_threadpool(files.read, asked["name"], data)
        session.open(asked["chat"])
        session.attach(asked["chat"], file)
        return {}

    async def weigh(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """What is typed is read ahead, and weighed: a line if it will not fit, and on demand the whole ledger."""
        name, text, say = asked["chat"], asked["text"], words(asked["language"])
        if not _exists(session, name):
            return {"line": "", "ledger": ""}
        ledger = await run_in_threadpool(partial(session.weigh, name, text, rows=asked["whole"]))
        if text.strip() and not asked["whole"]:
            await run_in_threadpool(session.ahead, name, text)
        policy = session.conversation(name).settings.get("overflow", "stop")
        whole = dialogs.ledger_html(ledger, say) if ledger and asked["whole"] else ""
        return {"line": dialogs.weight_html(ledger, policy, say), "ledger": whole}

    async def receipt(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        say = words(asked["language"])
        kept, node = await run_in_threadpool(session.receipt, asked["chat"], asked["node"])
        return {"html": dialogs.receipt_html(kept, node, say)}

    async def replay(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        found = await run_in_threadpool(session.replay, asked["chat"], asked["node"])
        return {"html": dialogs.replay_html(found, words(asked["language"]))}

    async def anew(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """A new conversation, and what is put into its box: `text` about the old one, and the question that has no answer."""
        made, pending = await run_in_threadpool(session.begin_anew, asked["chat"])
        say = words(asked["language"])
        head = say["so_far_summary" if asked["summarised"] else "so_far"]
        return {"chat": made.id, "draft": f"{head}\n{asked['text'].strip()}\n\n", "pending": pending}

    async def summary(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """The model's summary of a conversation: begun, looked at while it grows under a `name` of its own, and let go."""
        say = words(asked["language"])
        if asked["do"] == "begin":
            outline = await run_in_threadpool(session.outline, asked["chat"])
            try:
                answer, known = await run_in_threadpool(session.summarise, asked["chat"], say["summary_ask"])
            except ChatError as exc:
                return {"outline": outline, "why": told(exc, say["language"])}
            return {"outline": outline, "name": answer.node.conversation, "number": known}
        if asked["do"] == "stop":
            return await run_in_threadpool(session.stop, asked["name"]) or {}
        if asked["do"] == "drop":
            return await run_in_threadpool(session.delete, asked["name"]) or {}
        answer = self.chats.answer(asked["name"]) if _exists(session, asked["name"]) else None
        if answer:
            answer.watched_at = time.monotonic()
        view = await run_in_threadpool(session.view, asked["name"])
        return dialogs.summary(answer, view.turns[-1].node, asked["number"], say)

    async def bring_in(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        made = await run_in_threadpool(session.bring_in, asked["text"])
        return {"chat": made[0].id, "count": len(made)}

    async def export(self, request: Request) -> Response:
        """A file to save: of one conversation, or of all."""
        try:
            session = self.chats.of(self.owner(request.cookies, user_of(request)))
            name, form = request.query_params.get("chat", ""), request.query_params.get("form", "json")
            text = await run_in_threadpool(session.export, form, name)
        except ChatError as exc:
            return PlainTextResponse(told(exc, request.headers.get("accept-language")), 400)
        ending = {"markdown": "md"}.get(form, form)
        headers = {"content-disposition": f'attachment; filename="chat.{ending}"', "cache-control": "no-store"}
        return Response(text, media_type="application/octet-stream", headers=headers)

    async def act(self, session: Session, asked: dict[str, Any]) -> dict[str, Any]:
        """One thing a person did, by name."""
        chat, node, text = asked["chat"], asked.get("node", 0), str(asked.get("text", ""))
        deeds: dict[str, Callable[[], Any]] = {
            "stop": lambda: session.stop(chat),
            "regenerate": lambda: session.regenerate(chat, node),
            "continue": lambda: session.go_on(chat, node),
            "edit": lambda: session.edit(chat, node, text),
            "earlier": lambda: session.turn_to(chat, node, -1),
            "later": lambda: session.turn_to(chat, node, +1),
            "rename": lambda: session.rename(chat, text),
            "pin": lambda: session.pin(chat, True),
            "unpin": lambda: session.pin(chat, False),
            "delete": lambda: session.delete(chat),
            "restore": lambda: session.restore(chat),
            "remove": lambda: session.remove(chat, node),
            "put_back": lambda: session.put_back(chat, float(asked["when"]), asked["tip"]),
            "detach": lambda: session.detach(chat, asked["number"]),
            "allow_drop": lambda: session.allow_drop(chat),
            "drop_oldest": lambda: (session.allow_drop(chat), session.regenerate(chat, node)),
        }
        if asked["do"] not in deeds:
            raise BadRequest("The page asked for something this program cannot do: reload it.")
        made = await run_in_threadpool(deeds[asked["do"]])
        return made if isinstance(made, dict) else {}


def _exists(session: Session, name: str) -> bool:
    try:
        return bool(session.conversation(name))
    except BadRequest:
        return False

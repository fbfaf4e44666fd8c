"""The line to another server: OpenAI's client in an event loop of its own thread, and its errors in our sentences.

`Line(address, key).ask("/models")` waits for JSON; `stream(body)` gives a Flow, which can be cut at any moment, also while
the server has not said a word yet: that is what the event loop is for.
"""

import asyncio
import concurrent.futures
import queue
import ssl
import threading
from collections.abc import Mapping
from typing import Any

import httpx2
import openai

from chat.address import Address
from chat.engine import BackendUnavailable, BadRequest, ChatError, GenerationFailed

RETRIES = 2  # by the client: connections that fail, 408, 409, 429 and 5xx, with growing pauses
TIMEOUT = httpx2.Timeout(10.0, read=600.0, write=60.0)  # seconds; a long prompt is read in silence
END = object()
CUT = object()
BELOW = (openai.OpenAIError, httpx2.HTTPError, ssl.SSLError, ValueError)  # all that the client raises; ValueError: no JSON


class TooLong(ChatError):
    """The server finds that the conversation does not fit. The numbers it names are in its words."""


class Flow:
    """The events of one stream, as the server sends them: dicts, then END; CUT where the line was closed; or an error."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._task: concurrent.futures.Future[None] | None = None

    def next(self, seconds: float) -> Any:
        """An event, END or CUT; None where nothing came in that time. Raises ChatError, `from` the client's own error."""
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(item, ChatError):
            raise item
        return item

    def cut(self) -> None:
        """Close the connection, at whatever it was. Returns at once."""
        if self._task:
            self._task.cancel()


class Line:
    """`key` goes into the header and nowhere else. No redirect is followed, and no proxy asked for this machine itself."""

    def __init__(self, address: Address, key: str) -> None:
        self.address, self._key = address, key
        self._client = openai.AsyncOpenAI(
            base_url=address.base,
            api_key=key or "none",
            max_retries=RETRIES,
            http_client=httpx2.AsyncClient(
                timeout=TIMEOUT,
                trust_env=not address.loopback,
                follow_redirects=False,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            ),
        )
        self._loop = asyncio.new_event_loop()
        self._closed = threading.Event()
        self._close = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, seconds: float = 30.0) -> Any:
        """JSON of a path below `base`, or of a whole URL; posted where there is a body. Raises ChatError."""
        task = self._run(self._asked(path, body, seconds))
        try:
            return task.result()
        except concurrent.futures.CancelledError as exc:
            raise _closed() from exc

    def tell(self, path: str, body: Mapping[str, Any]) -> concurrent.futures.Future[Any]:
        """Post without waiting; what becomes of it is the future's."""
        return self._run(self._asked(path, body, 600.0))

    def stream(self, body: Mapping[str, Any]) -> Flow:
        flow = Flow()
        flow._task = self._run(self._pump(body, flow._queue))
        return flow

    def close(self) -> None:
        """Cut every stream and question. Idempotent."""
        with self._close:
            if self._closed.is_set():
                return
            self._closed.set()
            asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    # ---- in the loop's thread

    def _run(self, work: Any) -> concurrent.futures.Future[Any]:
        with self._close:
            if self._closed.is_set():
                work.close()
                raise _closed()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _asked(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        options = {"timeout": httpx2.Timeout(min(seconds, 10.0), read=seconds)}
        try:
            if body is None:
                return await self._client.get(path, cast_to=object, options=options)
            return await self._client.post(path, cast_to=object, body=dict(body), options=options)
        except BELOW as exc:
            raise self._sentence(exc) from exc

    async def _pump(self, body: Mapping[str, Any], out: "queue.SimpleQueue[Any]") -> None:
        begun = False
        try:
            stream = await self._client.post(
                "/chat/completions", cast_to=object, body=dict(body), stream=True, stream_cls=openai.AsyncStream[object]
            )
            begun = True
            kind = stream.response.headers.get("content-type", "nothing that says what it is")
            if "text/event-stream" not in kind:
                await stream.close()
                raise GenerationFailed(
                    "{where} answers with {kind}, not with a stream: is it an OpenAI-compatible server, and --url right?",
                    where=self.address.name,
                    kind=kind,
                )
            async for event in stream:
                out.put(event)
            out.put(END)
        except asyncio.CancelledError:
            out.put(CUT)
            raise
        except ChatError as exc:
            out.put(exc)
        except BELOW as exc:
            error = self._sentence(exc, begun)
            error.__cause__ = exc
            out.put(error)

    async def _wind_up(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    # ---- errors

    def _sentence(self, exc: Exception, begun: bool = False) -> ChatError:
        """What went wrong, for the person. The key is taken out of the server's words, should it repeat it."""
        where = self.address.name
        if isinstance(exc, openai.APITimeoutError):
            return GenerationFailed("{where} says nothing any more: is it overloaded? Try again.", where=where)
        if isinstance(exc, openai.APIConnectionError | httpx2.HTTPError | ssl.SSLError):
            reason = self._plain(str(exc.__cause__ or exc))
            if begun:
                return GenerationFailed(
                    "The connection to {where} broke in the middle of the answer ({reason}): try again.",
                    where=where,
                    reason=reason,
                )
            return BackendUnavailable(
                "No server answers at {where} ({reason}): is it running, and is --url right?", where=where, reason=reason
            )
        if not isinstance(exc, openai.APIStatusError):
            if isinstance(exc, openai.APIError):
                reason = self._plain(exc.message)
                return GenerationFailed("{where} stopped in the middle: {reason}", where=where, reason=reason)
            return GenerationFailed(
                "{where} sends something that no OpenAI-compatible server would ({reason}): is --url right?",
                where=where,
                reason=self._plain(str(exc)),
            )
        status, said = exc.status_code, self._plain(_said(exc))
        if _is_too_long(exc, said):
            return TooLong(said)
        if status in (401, 403):
            return BackendUnavailable(
                "{where} refuses the key ({status}): put the server's key into CHAT_API_KEY, in the environment.",
                where=where,
                status=status,
            )
        if status == 404:
            return BackendUnavailable(
                "{where} knows no such address or model ({said}): check --url, which often ends in /v1, and --model.",
                where=where,
                said=said,
            )
        if status == 429:
            return GenerationFailed(
                "{where} has too much to do (429), also after {retries} more tries: {said}",
                where=where,
                retries=RETRIES,
                said=said,
            )
        if 300 <= status < 400:
            return BackendUnavailable(
                "{where} sends on to another address ({status}), which is not followed: give the last one as --url.",
                where=where,
                status=status,
            )
        if status < 500:
            return BadRequest("{where} refuses the request ({status}): {said}", where=where, status=status, said=said)
        return GenerationFailed("{where} failed ({status}): {said}", where=where, status=status, said=said)

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "...")
        return text[:300] or "no reason given"


def _said(exc: openai.APIStatusError) -> str:
    body = exc.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        body = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return body if isinstance(body, str) and body else exc.message


def _is_too_long(exc: openai.APIStatusError, said: str) -> bool:
    """By OpenAI's code, llama-server's type, or vLLM's words."""
    body = exc.body if isinstance(exc.body, dict) else {}
    kinds = {body.get("code"), body.get("type")}
    return bool(kinds & {"context_length_exceeded", "exceed_context_size_error"}) or (
        exc.status_code == 400 and ("maximum context length" in said or "longer than the maximum model length" in said)
    )


def _closed() -> ChatError:
    return GenerationFailed("The engine is closed: open the model again.")

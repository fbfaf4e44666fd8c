"""What `spaces` 0.51.3 does on a ZeroGPU Space, without a GPU: fork, pickle, stop at the next yield, count a visitor's time.

Put on the path as `spaces`, or passed as `gpu=GPU`. A visitor is known by the X-IP-Token of the request in gradio's context
of the calling thread; the token "spent" has no time left.
"""

import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import wraps
from threading import Thread

FORK = multiprocessing.get_context("fork")
LOG: list[tuple[str | None, int]] = []  # token and seconds of every call


def GPU(*, duration: Callable[..., int]) -> Callable[[Callable[..., Iterator]], Callable[..., Iterator]]:
    def decorate(task: Callable[..., Iterator]) -> Callable[..., Iterator]:
        idle: list[Worker] = []

        @wraps(task)
        def handler(*args: object) -> Iterator:
            import gradio as gr
            from gradio.context import LocalContext

            request = LocalContext.request.get(None)
            token = request.headers.get("x-ip-token") if request is not None else None
            seconds = duration(*args)
            LOG.append((token, seconds))
            print("GPU asked for", token, seconds, flush=True)
            if token is None:
                raise gr.Error("Space app has reached its GPU limit. Try again.", title="ZeroGPU quota exceeded")
            if token == "spent":
                text = f"You have exceeded your free ZeroGPU quota ({seconds}s requested vs. 0s left). Try again in 3:21:00. "
                raise gr.Error(text, title="ZeroGPU quota exceeded")
            worker = idle.pop() if idle else Worker(task)
            worker.stop.clear()
            worker.inbox.send_bytes(pickle.dumps((args, {})))
            while True:
                try:
                    kind, value = pickle.loads(worker.outbox.recv_bytes())
                except EOFError:
                    raise gr.Error("GPU task aborted", title="ZeroGPU worker error") from None
                if kind == "end":
                    idle.append(worker)
                    return
                if kind == "error":
                    raise gr.Error(value, title="ZeroGPU worker error")
                try:
                    yield value
                except GeneratorExit:
                    worker.stop.set()
                    Thread(target=worker.drain, args=(idle,), daemon=True).start()
                    raise

        handler.idle = idle
        return handler

    return decorate


def gradio_auto_wrap(task: object) -> object:
    """Gradio asks for it where there is a `spaces`; there too it does nothing by default."""
    return task


class Worker:
    """One forked process, which serves one call after the other."""

    def __init__(self, task: Callable[..., Iterator]) -> None:
        self.stop = FORK.Event()
        theirs_in, self.inbox = FORK.Pipe(duplex=False)
        self.outbox, theirs_out = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._serve, args=(task, theirs_in, theirs_out), daemon=True)
        self.process.start()
        theirs_out.close()  # so that the child's end is the only one, and its death is seen

    def drain(self, idle: list["Worker"]) -> None:
        while pickle.loads(self.outbox.recv_bytes())[0] not in ("end", "error"):
            pass
        idle.append(self)

    def _serve(self, task: Callable[..., Iterator], inbox: object, outbox: object) -> None:
        while True:
            args, kwargs = pickle.loads(inbox.recv_bytes())

            def iterate(args: tuple = args, kwargs: dict = kwargs) -> None:
                events = task(*args, **kwargs)
                try:
                    for event in events:
                        if self.stop.is_set():
                            events.close()
                            break
                        outbox.send_bytes(pickle.dumps(("yield", event)))
                        time.sleep(0.001)
                except Exception as exc:  # noqa: BLE001 - the edge of this process
                    outbox.send_bytes(pickle.dumps(("error", type(exc).__name__)))
                    return
                outbox.send_bytes(pickle.dumps(("end", None)))

            thread = Thread(target=copy_context().run, args=(iterate,))  # not the main one, as there
            thread.start()
            thread.join()

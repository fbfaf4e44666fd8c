"""Real HTTP servers on loopback, for tests: `with serving(routes) as url: ...`"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute


@contextmanager
def serving(routes: Sequence[BaseRoute]) -> Iterator[str]:
    """Serve the routes at a free port, in a thread; the address without a slash at its end."""
    with serving_app(Starlette(routes=routes)) as url:
        yield url


@contextmanager
def serving_app(app: Any) -> Iterator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@contextmanager
def llama_cpp_python(model: Path, *, context: int) -> Iterator[str]:
    """llama-cpp-python's own server for a .gguf, in a process of its own; the address without /v1."""
    port = _free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", str(context)]
    command += ["--n_threads", "1", "--n_threads_batch", "1", "--verbose", "false", "--disable_ping_events", "true"]
    command += ["--interrupt_requests", "false"]  # or a second request would end the first
    with _process(command, port) as url:
        yield url


@contextmanager
def vllm(model: Path, *, context: int) -> Iterator[str]:
    """vLLM for a model folder, in a process of its own; the address without /v1."""
    port = _free_port()
    command = ["vllm", "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--max-model-len", str(context)]
    command += ["--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details", "--gpu-memory-utilization", "0.3"]
    with _process(command, port) as url:
        yield url


@contextmanager
def _process(command: Sequence[str], port: int) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, "the server did not start"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

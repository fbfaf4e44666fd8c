"""The ZeroGPU engine behind a decorator that forks and pickles, as `spaces` does: `pytest tests/chat/test_zerogpu.py`

That it keeps the contract of every engine is tested in test_engine_contract.py; here is what is special there.
"""

import os
import pickle
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from contextvars import copy_context
from types import SimpleNamespace

import pytest

from chat.answer import ModelState
from chat.chats import Chats
from chat.engine import BadRequest, ContextOverflow, GenerationFailed, Message, ModelUnusable, Sampling
from chat.store import Store
from tests import fake_spaces

zerogpu = pytest.importorskip("chat.zerogpu", reason="needs torch and transformers", exc_type=ImportError)
gradio_context = pytest.importorskip("gradio.context")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ZeroGPU forks, which Windows cannot")
GREEDY = Sampling(temperature=0.0, max_tokens=12)
HELLO = [Message("user", "Hello, how are you today?")]


def opened(checkpoint, gpu=fake_spaces.GPU, **options):
    zerogpu.torch.set_num_threads(1)  # a pool of threads would not survive the fork
    return zerogpu.open_zerogpu(checkpoint, gpu=gpu, context=512, device="cpu", dtype="float32", piece=16, **options)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    with closing(opened(tiny_checkpoint)) as engine:
        yield engine
    for worker in engine._write.idle:
        worker.process.kill()


@contextmanager
def visitor(token):
    """In the context of a visitor's request, as gradio sets it."""
    before = gradio_context.LocalContext.request.get(None)
    gradio_context.LocalContext.request.set(SimpleNamespace(headers={"x-ip-token": token}))
    yield
    gradio_context.LocalContext.request.set(before)


def say(engine, messages=HELLO, sampling=GREEDY):
    chunks = list(engine.stream(messages, sampling))
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def test_what_is_written_in_a_fork_is_what_is_written_here(engine, tiny_checkpoint):
    wild = Sampling(temperature=1.2, max_tokens=20, seed=5, repetition_penalty=1.2)
    with visitor("ann"), closing(opened(tiny_checkpoint, zerogpu.untouched)) as here:
        for sampling in (GREEDY, wild):
            assert say(engine, HELLO, sampling)[0] == say(here, HELLO, sampling)[0] != ""


def test_a_process_that_is_taken_again_reads_only_what_is_new(engine):
    long = [Message("user", "The quick brown fox jumps over the lazy dog. " * 6)]
    with visitor("ann"):
        text, _ = say(engine, long)
        _, last = say(engine, [*long, Message("assistant", text), Message("user", "Why?")])
    assert last.stats.reused >= engine.count(long) - 8
    assert last.stats.reused < last.stats.prompt


def test_all_that_crosses_is_small_and_plain(tiny_checkpoint):
    crossed = []

    def recording(*, duration):
        def decorate(task):
            def handler(*args):
                crossed.append(args)
                assert duration(*args) == args[0].seconds
                for event in task(*args):
                    crossed.append(event)
                    yield event

            return handler

        return decorate

    with closing(opened(tiny_checkpoint, recording)) as engine:
        say(engine)
    (task,) = crossed[0]
    assert pickle.loads(pickle.dumps(task)) == task
    assert {type(event) for event in crossed[1:]} == {int, list}
    assert all(type(number) is int for event in crossed[1:] if isinstance(event, list) for number in event)


def test_a_long_answer_asks_for_less_time_than_a_visitor_has(engine):
    fake_spaces.LOG.clear()
    with visitor("ann"):
        say(engine, HELLO, Sampling(temperature=0, max_tokens=4))
        say(engine, HELLO, Sampling(temperature=0))
    (_, short), (_, long) = fake_spaces.LOG
    assert 0 < short < long <= zerogpu.LONGEST_S


def test_an_answer_that_takes_longer_than_was_asked_for_ends_as_too_long(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(zerogpu, "LONGEST_S", 0)
    with closing(opened(tiny_checkpoint, zerogpu.untouched)) as engine:
        _, last = say(engine, HELLO, Sampling(temperature=0, max_tokens=100))
    assert last.finish in ("length", "stop") and last.stats.completion == 1


def test_closing_a_stream_stops_the_process_at_its_next_yield(engine):
    with visitor("ann"):
        with closing(engine.stream(HELLO, Sampling(temperature=1, max_tokens=400, seed=1))) as stream:
            next(chunk for chunk in stream if chunk.tokens)
        deadline = time.monotonic() + 30
        while not engine._write.idle and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine._write.idle, "it still writes"
        assert say(engine)[0]


def test_without_a_visitor_there_is_no_gpu_and_a_sentence(engine):
    with pytest.raises(GenerationFailed, match="who is asking"):
        say(engine)


def test_a_visitor_whose_time_is_used_up_is_told_when_there_is_more(engine):
    with visitor("spent"), pytest.raises(GenerationFailed, match=r"used up: try again in 3:21:00, or sign in"):
        say(engine)


def test_a_process_that_is_killed_is_a_sentence_and_the_next_answer_comes(engine):
    with visitor("ann"):
        with pytest.raises(GenerationFailed, match="taken away"):
            for chunk in engine.stream(HELLO, Sampling(temperature=1, max_tokens=400, seed=1)):
                if chunk.tokens:
                    for child in fake_spaces.multiprocessing.active_children():
                        os.kill(child.pid, signal.SIGKILL)
        engine._write.idle.clear()
        assert say(engine)[0]


@pytest.mark.parametrize(
    ("title", "text", "sentence"),
    [
        ("ZeroGPU queue timeout", "No GPU was available after 60s Retry later", "No GPU became free"),
        ("ZeroGPU client error", "No GPU was available", "No GPU became free"),
        ("ZeroGPU illegal duration", "The requested GPU duration (90s) is larger than the maximum allowed", "max tokens"),
        ("ZeroGPU pending credits exceeded", "You have too many ZeroGPU credits", "wait until"),
        ("ZeroGPU worker error", "GPU task aborted", "Continue"),
        ("ZeroGPU worker error", "OutOfMemoryError", "memory ran out"),
        ("ZeroGPU worker error", "KeyError", r"\(KeyError\)"),
        ("ZeroGPU client error", "Expired ZeroGPU proxy token", r"\(Expired ZeroGPU proxy token\)"),
        ("ZeroGPU quota exceeded", "You have exceeded your ZeroGPU runs limit. ", "try again later"),
    ],
)
def test_every_error_of_zerogpu_is_a_sentence(title, text, sentence):
    error = RuntimeError(text)
    error.title, error.message = title, text
    with pytest.raises(GenerationFailed, match=sentence):
        raise zerogpu.failure(error)


def test_too_long_is_said_without_asking_for_a_gpu(engine):
    fake_spaces.LOG.clear()
    with visitor("ann"), pytest.raises(ContextOverflow):
        say(engine, [Message("user", "the lazy dog " * 600)])
    assert not fake_spaces.LOG


def test_reading_ahead_and_closing_before_the_start_ask_for_no_gpu(engine):
    fake_spaces.LOG.clear()
    with visitor("ann"):
        engine.prefill([Message("user", "The quick brown fox jumps over the lazy dog. " * 6)])
        with closing(engine.stream(HELLO, GREEDY)) as stream:
            assert next(stream).progress == (0, engine.count(HELLO))
        engine.forget("a")
    assert not fake_spaces.LOG


def test_a_schema_is_refused(engine):
    with pytest.raises(BadRequest, match="llama"):
        say(engine, HELLO, Sampling(schema="{}"))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelUnusable):
        zerogpu.open_zerogpu(tmp_path)


def test_an_answers_thread_runs_in_the_context_of_the_request(engine):
    """`spaces` looks for the visitor there; a bare thread would have none."""
    chats = Chats(Store(None), lambda: ModelState(engine=engine))

    def send():
        with visitor("bob"):
            session = chats.of("bob")
            chat = session.create(settings={"max_tokens": 5, "temperature": 0})
            return session, chat, session.send(chat.id, "Hello!")

    fake_spaces.LOG.clear()
    session, chat, answer = copy_context().run(send)
    assert answer.wait(30)
    assert answer.state in ("whole", "length"), answer.note
    assert {token for token, _ in fake_spaces.LOG} == {"bob"}
    again = []
    threading.Thread(target=lambda: again.append(session.regenerate(chat.id, answer.node.id))).start()
    deadline = time.monotonic() + 30
    while not again and time.monotonic() < deadline:
        time.sleep(0.01)
    assert again[0].wait(30) and again[0].state == "failed" and "who is asking" in again[0].note
    chats.close()

"""Two implementations of one thing: both engines read the same prompts and write the same greedy text, in float32."""

from contextlib import closing
from pathlib import Path

import pytest

from chat.engine import Message, Sampling

CONVERSATIONS = {
    "a question": [Message("user", "What is the capital of France?")],
    "a system prompt": [Message("system", "You are a helpful assistant."), Message("user", "Hello!")],
    "several turns": [Message("user", "Hello"), Message("assistant", "I am fine."), Message("user", "1 + 1 = ?")],
    "an empty turn": [Message("user", ""), Message("assistant", ""), Message("user", "x")],
    "Unicode": [Message("user", "cafe\u0301 Größe 你好，世界 🙂 \u1112\u1161\u11ab\tz\r\n\n  x ")],
    "what looks like special tokens": [
        Message("user", "<|im_end|>\n<|im_start|>system\nI <think> so </think> </s> <|endoftext|>")
    ],
    "an answer to go on with": [Message("user", "Count."), Message("assistant", "one two")],
    "an answer that quotes tags": [Message("user", "x"), Message("assistant", "a</think>b"), Message("user", "y")],
}
SAMPLING = {"plain": {}, "thinking": {"thinking": True}, "penalty": {"repetition_penalty": 1.3}}


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path, tiny_gguf: Path):
    cuda = pytest.importorskip("chat.cuda", reason="needs torch and transformers", exc_type=ImportError)
    from chat.gguf import open_gguf

    cuda.torch.set_num_threads(1)
    opened = cuda.open_cuda(tiny_checkpoint, context=512, device="cpu", dtype="float32", streams=2, piece=64)
    with closing(opened) as one, closing(open_gguf(tiny_gguf, context=512, kv="f32", threads=1)) as other:
        yield one, other


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_engines_render_the_same_prompt(engines, name: str) -> None:
    one, other = engines
    messages = CONVERSATIONS[name]
    for thinking in (False, True):
        assert one._files.template.render(messages, thinking=thinking) == other._template.render(messages, thinking=thinking)
    assert one.count(messages) == other.count(messages)


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_engines_write_the_same_greedy_text(engines, name: str, settings: dict) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=32, **settings)
    one, other = (
        [(chunk.text, chunk.kind) for chunk in engine.stream(CONVERSATIONS[name], sampling) if chunk.text]
        for engine in engines
    )
    assert one == other

"""Models that several rooms test with. They are made once a run, from nothing but this repository."""

import os
from pathlib import Path

import pytest

from tests.tiny import write_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: no test may reach for the network
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers in BF16, as a Hugging Face folder."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_gguf(tiny_checkpoint: Path) -> Path:
    """The same weights in F32, as a GGUF: in BF16 llama.cpp rounds activations too, and a near tie may turn with the batch."""
    from convert.run import convert

    out = tiny_checkpoint.parent / "tiny-F32.gguf"
    convert(tiny_checkpoint, out, quant=("F32",), verify="none")
    return out

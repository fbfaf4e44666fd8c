"""Tiny Qwen3 folders that can be trained: the project's tiny checkpoint with freshly initialised weights."""

import json
from pathlib import Path

from tests.tiny import write_checkpoint


def write_model(folder: Path, seed: int = 0, **shape) -> Path:
    """A folder with config, tokenizer, template and fp32 weights; equal arguments give equal weights."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    write_checkpoint(folder, dtype="F32", **shape)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.1
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversation(*texts: str) -> dict:
    """User and assistant in turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}

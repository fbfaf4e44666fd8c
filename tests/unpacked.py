"""A GGUF of the guide as a Hugging Face folder again: what the file holds, in float32, for an engine that reads folders."""

import json
import re
from pathlib import Path

from distill.guide import blank

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weight_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    where, short = (f"layers.{block[1]}.", block[2]) if block else ("", name.removesuffix(".weight"))
    return f"model.{where}{NAMES[short]}.weight"


def unpack(path: Path, folder: Path) -> Path:
    """Writes weights, config, tokenizer and template of the GGUF at `path` into `folder`, and gives it."""
    import gguf
    from safetensors.numpy import save_file
    from tokenizers import models

    reader = gguf.GGUFReader(path)

    def field(key: str):
        return reader.fields[key].contents()

    weights = {weight_name(one.name): gguf.dequantize(one.data, one.tensor_type).copy() for one in reader.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    layers, tokens = field("qwen3.block_count"), field("tokenizer.ggml.tokens")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "hidden_size": field("qwen3.embedding_length"),
        "intermediate_size": field("qwen3.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": field("qwen3.attention.head_count"),
        "num_key_value_heads": field("qwen3.attention.head_count_kv"),
        "head_dim": field("qwen3.attention.key_length"),
        "max_position_embeddings": field("qwen3.context_length"),
        "rms_norm_eps": field("qwen3.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": field("qwen3.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    marks = (*blank.SPECIAL, *blank.PLAIN_ADDED)
    learned = tokens[: tokens.index(marks[0])]
    merges = [tuple(one.split(" ", 1)) for one in field("tokenizer.ggml.merges")]
    built = blank.with_marks(blank.cutter(models.BPE({token: i for i, token in enumerate(learned)}, merges)))
    blank.write_tokenizer(built, folder, config["max_position_embeddings"])
    (folder / "chat_template.jinja").write_text(field("tokenizer.chat_template"), encoding="utf-8")
    return folder

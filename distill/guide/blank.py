"""A blank model: a byte-level BPE vocabulary learned from the rows, and random weights of a given size, as a model folder.

The vocabulary is Qwen2's kind (NFC, the same pre-tokenizer), with Qwen3's special tokens at the end of the ids.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
QWEN2_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@dataclass(frozen=True)
class Size:
    """A Qwen3 shape with tied embeddings. All widths are multiples of 32, so that Q8_0 fits every tensor."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocabulary: int = 4096
    context: int = 2048


SIZES = {
    "teacher": Size(hidden=256, layers=8, intermediate=768, heads=4, kv_heads=2),
    "student": Size(hidden=192, layers=6, intermediate=576, heads=3, kv_heads=1),
    "mini": Size(hidden=64, layers=2, intermediate=128, heads=2, kv_heads=1, head_dim=32, vocabulary=512, context=1024),
}


def with_marks(built):
    """The tokenizer with Qwen3's special tokens at the end of its ids."""
    from tokenizers import AddedToken

    built.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    built.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    return built


def cutter(model):
    """A `tokenizers.Tokenizer` around a BPE `model` that cuts text as Qwen2 does."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    built = Tokenizer(model)
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    return built


def learn_tokenizer(texts: Iterable[str], vocabulary: int):
    """A `tokenizers.Tokenizer` with at most `vocabulary` entries, special tokens included."""
    from tokenizers import models, pre_tokenizers, trainers

    built = cutter(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(PLAIN_ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    built.train_from_iterator(texts, trainer)
    return with_marks(built)


def write_tokenizer(built, directory: Path, context: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    built.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


def write_weights(directory: Path, size: Size, built, seed: int) -> int:
    """Random weights in float32 for the tokenizer `built`; returns the number of parameters."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    end_of_text, im_end = (built.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>"))
    config = Qwen3Config(
        vocab_size=-(-built.get_vocab_size() // 64) * 64,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.context,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=im_end,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    # Cool by default: so small a model is at its best with little luck.
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[im_end, end_of_text],
        pad_token_id=end_of_text,
        do_sample=True,
        temperature=0.3,
        top_k=20,
        top_p=0.9,
    )
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())

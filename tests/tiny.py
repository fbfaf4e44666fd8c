"""A Qwen3 checkpoint with random weights, small enough for a test: real file layout, real tokenizer, no torch.

`write_checkpoint(directory)` writes about 1 MB; equal arguments give equal bytes.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATE = Path(__file__).parents[1] / "distill" / "guide" / "chat_template.jinja"
QWEN2_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TEXT = (
    "The quick brown fox jumps over the lazy dog. Hello, how are you today? I am fine, thank you! "
    "system user assistant You are a helpful assistant. What is the capital of France? Paris is the capital of France.\n"
    "def add(a, b):\n    return a + b\n\n1 + 1 = 2, and so on. 你好，世界。 Größe, naïve, café. 🙂 don't we'll they're\n"
)


def tokenizer(vocabulary: int = 400) -> Tokenizer:
    """Byte-level BPE as Qwen2's: NFC, the same pre-tokenizer, Qwen3's special tokens at the end of the ids."""
    built = Tokenizer(models.BPE())
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(PLAIN_ADDED)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    built.train_from_iterator([TEXT] * 3, trainer)
    built.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    built.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    return built


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits as uint16, rounded half to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    """`tensors` hold float32 numbers; `dtype` is BF16, F16 or F32."""
    stored = {
        name: bf16(value) if dtype == "BF16" else value.astype({"F16": np.float16, "F32": np.float32}[dtype])
        for name, value in tensors.items()
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in stored.items():
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for value in stored.values():
            file.write(value.tobytes())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(
    directory: Path,
    *,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocabulary: int = 400,
    padded_vocabulary: int = 416,
    max_positions: int = 2048,
    dtype: str = "BF16",
    shards: int = 1,
    tied: bool = True,
    layout: str = "transformers5",
    template: str | None = None,
    seed: int = 0,
) -> Path:
    """Write config, tokenizer and weights into `directory` (made if missing) and return it.

    `template` is the chat template's text: by default the project's own; "" writes none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)

    built = tokenizer(vocabulary)

    def normal(*shape: int, gain: float = 1.0) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) * np.float32(gain / np.sqrt(shape[-1]))

    def embedding() -> np.ndarray:
        """Rows of special and padding tokens are zero, so that greedy text is long and visible."""
        rows = normal(padded_vocabulary, hidden)
        rows[built.get_vocab_size() :] = 0
        rows[[built.token_to_id(text) for text in SPECIAL + PLAIN_ADDED]] = 0
        return rows

    tensors = {"model.embed_tokens.weight": embedding()}
    queries, keys = heads * head_dim, kv_heads * head_dim
    for i in range(layers):
        tensors |= {
            f"model.layers.{i}.{name}.weight": value
            for name, value in {
                "input_layernorm": np.ones(hidden, np.float32),
                "self_attn.q_proj": normal(queries, hidden),
                "self_attn.k_proj": normal(keys, hidden),
                "self_attn.v_proj": normal(keys, hidden),
                "self_attn.o_proj": normal(hidden, queries, gain=2.0),
                "self_attn.q_norm": np.full(head_dim, 4, np.float32),
                "self_attn.k_norm": np.ones(head_dim, np.float32),
                "post_attention_layernorm": np.ones(hidden, np.float32),
                "mlp.gate_proj": normal(intermediate, hidden),
                "mlp.up_proj": normal(intermediate, hidden),
                "mlp.down_proj": normal(hidden, intermediate, gain=2.0),
            }.items()
        }
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    if not tied:
        tensors["lm_head.weight"] = embedding()

    names = list(tensors)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
    else:
        weight_map = {}
        for number in range(shards):
            part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            write_safetensors(directory / file, {name: tensors[name] for name in part}, dtype)
            weight_map |= dict.fromkeys(part, file)
        size = sum(value.size for value in tensors.values()) * (4 if dtype == "F32" else 2)
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})

    built.save(str(directory / "tokenizer.json"))
    end_of_text, im_end = (built.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>"))
    text = TEMPLATE.read_text(encoding="utf-8") if template is None else template
    settings: dict[str, object] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": im_end,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": padded_vocabulary,
    }
    torch_dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    if layout == "transformers4":
        config |= {"rope_scaling": None, "rope_theta": 1_000_000.0, "torch_dtype": torch_dtype}
        settings["add_bos_token"] = False
        settings["added_tokens_decoder"] = {
            str(built.token_to_id(text)): {"content": text, "special": text in SPECIAL, "normalized": False}
            | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
            for text in SPECIAL + PLAIN_ADDED
        }
        if text:
            settings["chat_template"] = text
    else:
        config |= {
            "dtype": torch_dtype,
            "layer_types": ["full_attention"] * layers,
            "pad_token_id": None,
            "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        }
        if text:
            (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
    write_json(directory / "tokenizer_config.json", settings)
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "do_sample": True,
            "eos_token_id": [im_end, end_of_text],
            "pad_token_id": end_of_text,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )
    write_json(directory / "config.json", config)
    return directory

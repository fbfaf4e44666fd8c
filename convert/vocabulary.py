"""tokenizer.json and its companions, as GGUF states them: tokens, types, merges, special ids, chat template."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert.errors import ConvertError
from convert.source import Source, read_json

# Qwen2's pre-tokenizer. llama.cpp has it compiled in under the name "qwen2"; a file can only name it, not carry it.
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Texts that llama.cpp takes for the end of an answer wherever they stand in the vocabulary (src/llama-vocab.cpp).
# fmt: off
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>",
    "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>",
))
# fmt: on


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]  # one per row of the embedding
    types: list[int]  # gguf.TokenType
    merges: list[str]  # "left right"
    eos: int
    eot: int
    eom: int | None  # a further end of an answer that no other key can carry
    bos: int
    padding: int
    ends: tuple[int, ...]  # generation_config's end tokens
    templates: dict[str, str]  # "default" and named ones
    notes: tuple[str, ...]

    @property
    def template(self) -> str:
        return self.templates["default"]


def check_pipeline(tokenizer: dict[str, Any]) -> None:
    """Raises ConvertError unless llama.cpp's "qwen2" does what this tokenizer.json describes."""

    def refuse(part: str) -> ConvertError:
        return ConvertError(
            f"tokenizer.json is not Qwen2's: {part}. GGUF can only name a tokenizer that llama.cpp knows, so the text "
            "would be cut in other places than the model learned."
        )

    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise refuse(f"its model is {model.get('type')!r}, not 'BPE'")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            raise refuse(f"its model sets {key} to {model[key]!r}")
    normalizer = tokenizer.get("normalizer") or {}
    if normalizer.get("type") == "Sequence" and len(normalizer.get("normalizers", ())) == 1:
        normalizer = normalizer["normalizers"][0]
    if normalizer.get("type") not in (None, "NFC"):
        raise refuse(f"its normalizer is {normalizer.get('type')!r}, not 'NFC'")
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
    kinds = [step.get("type") for step in steps]
    if kinds != ["Split", "ByteLevel"]:
        raise refuse(f"its pre-tokenizer is {kinds or tokenizer.get('pre_tokenizer')!r}, not Split and ByteLevel")
    split, bytes_ = steps
    if split.get("pattern", {}).get("Regex") != QWEN2 or split.get("behavior") != "Isolated" or split.get("invert"):
        raise refuse(f"it splits by {split.get('pattern')!r}")
    if bytes_.get("add_prefix_space") or bytes_.get("use_regex"):
        raise refuse("its byte-level step adds a space or splits again")
    post = tokenizer.get("post_processor") or {}
    if post.get("type") not in (None, "ByteLevel"):
        raise refuse(f"its post-processor {post.get('type')!r} may add tokens")


def read_templates(directory: Path, settings: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The chat templates, byte for byte, and notes. As transformers does, a .jinja file wins over tokenizer_config.json."""
    notes = []
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        templates = {entry["name"]: entry["template"] for entry in stated}
    else:
        templates = {"default": stated} if stated else {}
    old = directory / "chat_template.json"
    if not templates and old.is_file():
        templates = {"default": read_json(old).get("chat_template", "")}
    file = directory / "chat_template.jinja"
    if file.is_file():
        text = file.read_bytes().decode("utf-8")
        if templates.get("default", text) != text:
            notes.append(
                "chat_template.jinja and tokenizer_config.json differ; the .jinja file was taken, as transformers does."
            )
        templates["default"] = text
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = extra.read_bytes().decode("utf-8")
    if not templates.get("default"):
        raise ConvertError(
            f"{directory} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "a chat model is useless without one. Copy it from the model this one was made from."
        )
    return templates, notes


def read_vocabulary(source: Source, directory: Path | None = None) -> Vocabulary:
    """From `directory`, by default the source's own.

    Raises ConvertError for a tokenizer that llama.cpp would not reproduce, and for one without a chat template."""
    directory = directory or source.directory
    tokenizer = read_json(directory / "tokenizer.json")
    settings_file = directory / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    check_pipeline(tokenizer)
    templates, notes = read_templates(directory, settings)

    size = source.shape.vocabulary
    tokens: list[str | None] = [None] * size
    types = [int(TokenType.UNUSED)] * size
    ids: dict[str, int] = {}

    def place(text: str, number: int, kind: TokenType) -> None:
        if not isinstance(number, int) or not 0 <= number < size:
            raise ConvertError(f"tokenizer.json gives {text!r} the id {number}; the embedding has {size:,} rows.")
        if tokens[number] not in (None, text):
            raise ConvertError(f"tokenizer.json gives both {tokens[number]!r} and {text!r} the id {number}.")
        tokens[number], types[number], ids[text] = text, int(kind), number

    for text, number in tokenizer["model"]["vocab"].items():
        place(text, number, TokenType.NORMAL)
    added = set()
    for token in tokenizer.get("added_tokens", ()):
        text = token["content"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ConvertError(f"tokenizer.json strips or isolates around {text!r}; llama.cpp does not do that.")
        control = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
        place(text, token["id"], TokenType.CONTROL if control else TokenType.USER_DEFINED)
        added.add(text)
    for text in sorted(ENDS & ids.keys() - added):
        # An ordinary entry that merges can never produce (the pre-tokenizer splits it), yet llama.cpp would stop at it.
        tokens[ids[text]], types[ids.pop(text)] = None, int(TokenType.UNUSED)
        notes.append(
            f"The vocabulary's unreachable entry {text!r} was blanked: llama.cpp would take it for the end of an answer."
        )
    filled = [f"[PAD{number}]" if text is None else text for number, text in enumerate(tokens)]

    def named(key: str) -> int | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return None
        if text not in ids:
            raise ConvertError(f"tokenizer_config.json names {text!r} as {key}; tokenizer.json has no such token.")
        return ids[text]

    def numbered(*keys: str) -> list[int]:
        for settings_ in (source.generation, source.config):
            for key in keys:
                value = settings_.get(key)
                if value is not None:
                    numbers = value if isinstance(value, list) else [value]
                    for number in numbers:
                        if not isinstance(number, int) or not 0 <= number < size:
                            raise ConvertError(f"{key} is {number!r}; the vocabulary has {size:,} entries.")
                    return numbers
        return []

    ends = numbered("eos_token_id")
    eos = named("eos_token")
    if eos is None:
        if not ends:
            raise ConvertError("No end token: tokenizer_config.json has no eos_token, config.json no eos_token_id.")
        eos = ends[0]
    bos = named("bos_token")
    padding = named("pad_token")
    eot = ids.get("<|im_end|>", eos)
    known = {eos, eot} | {ids[text] for text in ENDS & ids.keys()}
    beyond = [number for number in ends if number not in known]
    if len(beyond) > 1:
        raise ConvertError(
            f"generation_config.json ends answers at {ends}; GGUF has no key for a list, and {beyond} would not be among them."
        )
    return Vocabulary(
        tokens=filled,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]],
        eos=eos,
        eot=eot,
        eom=beyond[0] if beyond else None,
        bos=bos if bos is not None else next(iter(numbered("bos_token_id")), ids.get("<|endoftext|>", eos)),
        padding=padding if padding is not None else next(iter(numbered("pad_token_id")), ids.get("<|endoftext|>", eos)),
        ends=tuple(ends) or (eos,),
        templates=templates,
        notes=tuple(notes),
    )


def encoder(tokenizer: Path) -> Callable[[str], list[int]]:
    """The model's own tokenizer; control tokens in the text are recognised, none are added."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    return lambda text: loaded.encode(text, add_special_tokens=False).ids

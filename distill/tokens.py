"""Rows as token ids: rendered by the model's own template, with a mark on every token that is trained.

A conversation becomes one token row as long as the template only appends; where it rewrites history (thoughts are dropped
from earlier turns) each answer gets a row of its own, which is exactly what the model sees when it writes that answer.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.recipe import Recipe
from distill.rows import BadRow, Report, Row
from distill.windows import digest, uniform

VERSION = 4  # of what this file makes: part of the cache key


@dataclass(frozen=True)
class TokenRow:
    """`ids` [L] int; `trained` [L] bool, true where the token is a target; `prompt`: tokens before the last answer."""

    ids: np.ndarray
    trained: np.ndarray
    prompt: int
    held_out: bool
    key: int
    place: str = ""


@dataclass(frozen=True)
class TokenRows:
    """Many rows end to end: ids [T] int32, trained [T] uint8, offsets [R+1] int64; prompts, held_out, keys [R]."""

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray
    held_out: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> TokenRow:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return TokenRow(
            self.ids[part],
            self.trained[part].astype(bool),
            int(self.prompts[index]),
            bool(self.held_out[index]),
            int(self.keys[index]),
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def where(self, chosen: np.ndarray) -> list[TokenRow]:
        return [self[index] for index in np.flatnonzero(chosen)]

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> "TokenRows":
        join = lambda parts, dtype: np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)  # noqa: E731
        return cls(
            join([row.ids for row in rows], np.int32),
            join([row.trained for row in rows], np.uint8),
            np.cumsum([0, *(len(row.ids) for row in rows)]).astype(np.int64),
            np.array([row.prompt for row in rows], np.int32),
            np.array([row.held_out for row in rows], np.uint8),
            np.array([row.key & (2**63 - 1) for row in rows], np.int64),
        )

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        part = path.with_suffix(".part")
        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in self.__dataclass_fields__}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "TokenRows":
        from safetensors.numpy import load_file

        return cls(**load_file(path))


def end_tokens(tokenizer, generation_eos: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's EOS and those of the generation config, sorted."""
    more = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or [])
    return tuple(sorted({token for token in [tokenizer.eos_token_id, *more] if token is not None}))


@dataclass(frozen=True)
class Turn:
    """The text before an answer and the text up to its end."""

    before: str
    through: str


def has_thought(message) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in message["content"]


def render_turns(row: Row, render: Callable[..., str], recipe: Recipe) -> list[Turn]:
    """The answers of a conversation that are to be trained; for an unanswered row one turn without an answer."""
    messages = [dict(message) for message in row.messages]
    if not row.answered:
        prompt = render(messages, add_generation_prompt=True, enable_thinking=recipe.thinking == "on")
        return [Turn(prompt, prompt)]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = []
    for index in answers if recipe.train_on == "all" else answers[-1:]:
        thinking = has_thought(messages[index]) if recipe.thinking == "auto" else recipe.thinking == "on"
        before = render(messages[:index], add_generation_prompt=True, enable_thinking=thinking)
        through = render(messages[: index + 1], add_generation_prompt=False, enable_thinking=thinking)
        thought = messages[index].get("reasoning_content")
        if thought and thought.strip() not in through[len(before) :]:  # a template that knows no reasoning_content
            answer = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{messages[index]['content']}"}
            through = render([*messages[:index], answer], add_generation_prompt=False, enable_thinking=thinking)
        if not through.startswith(before):
            raise BadRow("the rendered prompt is no beginning of the rendered conversation")
        turns.append(Turn(before, through))
    return turns


def chains(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Turns grouped so that within a group each one only appends to the one before."""
    group: list[Turn] = []
    for turn in turns:
        if group and not turn.before.startswith(group[-1].through):
            yield group
            group = []
        group.append(turn)
    if group:
        yield group


def mark(group: Sequence[Turn], encode: Callable[[str], list[int]], ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, trained, prompt length) of a group. An answer is trained up to and including its last end token."""
    ids = np.array(encode(group[-1].through), np.int64)
    trained = np.zeros(len(ids), bool)
    prompt = 0
    for turn in group:
        before = encode(turn.before)
        prompt, stop = len(before), len(ids) if turn is group[-1] else len(encode(turn.through))
        if ids[:prompt].tolist() != before:
            raise BadRow("the tokens of the prompt are no beginning of the tokens of the conversation")
        last = np.flatnonzero(np.isin(ids[prompt:stop], ends))
        trained[prompt : prompt + last[-1] + 1 if len(last) else stop] = True
    used = np.flatnonzero(trained)
    return (ids, trained, prompt) if not len(used) else (ids[: used[-1] + 1], trained[: used[-1] + 1], prompt)


def tokenize(rows: Sequence[Row], tokenizer, ends: Sequence[int], recipe: Recipe, report: Report) -> TokenRows:
    """Every usable row as token rows; those beyond `max_tokens`, or that the template cannot take, go to `report`."""
    from jinja2 import TemplateError

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(messages, **options) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    needs_answer = recipe.on_policy_share != (1.0, 1.0)
    needs_room = recipe.new_tokens if recipe.needs_teacher and (recipe.on_policy_share[0] or recipe.on_policy_share[1]) else 0
    if recipe.mode == "seqkd":
        needs_answer, needs_room = False, recipe.new_tokens
    made: list[TokenRow] = []
    texts: list[tuple[Row, list[int]]] = []
    asked: dict[bytes, int] = {}
    for row in rows:
        held_out = not recipe.eval_data and uniform(recipe.seed, "split", row.prompt_key) < recipe.holdout
        try:
            if row.text:
                if needs_room:
                    raise BadRow("a `text` row has no prompt to answer")
                texts.append((row, encode(row.text)))
                continue
            if needs_answer and not row.answered:
                raise BadRow("no answer, which this mode needs")
            for group in chains(render_turns(row, render, recipe)):
                ids, trained, prompt = mark(group, encode, ends)
                if prompt + needs_room > recipe.max_tokens:
                    raise BadRow(f"prompt longer than max_tokens ({recipe.max_tokens}) leaves room for")
                if len(ids) > recipe.max_tokens:
                    if needs_answer:
                        raise BadRow(f"longer than max_tokens ({recipe.max_tokens})")
                    ids, trained = ids[:prompt], trained[:prompt]
                # the key names the noise of sampling: of the prompt, so that samples do not depend on the data's answers
                before = ids[:prompt].tobytes()
                asked[before] = asked.get(before, 0) + 1
                made.append(TokenRow(ids, trained, prompt, held_out, digest(before.hex(), asked[before]), row.place))
        except BadRow as exc:
            report.refuse(row.place, str(exc))
        except TemplateError as exc:
            report.refuse(row.place, f"the chat template refuses it: {exc}")
    end = tokenizer.convert_tokens_to_ids(recipe.text_end)
    made += pack(texts, end if isinstance(end, int) and end != tokenizer.unk_token_id else ends[0], recipe)
    return TokenRows.of(made)


def pack(texts: Sequence[tuple[Row, list[int]]], end: int, recipe: Recipe) -> list[TokenRow]:
    """Texts end to end, each closed by `end`, cut into rows of `max_tokens`: no padding at all. Every token is a target."""
    packed = []
    for held_out in (False, True):
        chosen = [
            ids
            for row, ids in texts
            if (not recipe.eval_data and uniform(recipe.seed, "split", row.prompt_key) < recipe.holdout) == held_out
        ]
        # a seeded order, so that texts of one file do not all share rows
        order = np.random.default_rng(recipe.seed).permutation(len(chosen))
        flat = np.array([token for index in order for token in (*chosen[index], end)], np.int64)
        for number, start in enumerate(range(0, len(flat), recipe.max_tokens)):
            ids = flat[start : start + recipe.max_tokens]
            if len(ids) > 1:
                packed.append(TokenRow(ids, np.arange(len(ids)) > 0, 0, held_out, number + 2**62 * held_out))
    return packed


def cache_key(rows: Sequence[Row], tokenizer, ends: Sequence[int], recipe: Recipe) -> str:
    """A hash of everything that decides the token rows."""
    found = hashlib.blake2b(digest_size=12)
    for row in rows:
        found.update(f"{row.key}{row.answered}".encode())
    settings = {
        name: getattr(recipe, name)
        for name in (
            "mode",
            "lmbda",
            "lmbda_end",
            "max_tokens",
            "new_tokens",
            "train_on",
            "thinking",
            "text_end",
            "holdout",
            "seed",
        )
    }
    parts = [VERSION, settings, bool(recipe.eval_data), list(ends), tokenizer.chat_template, tokenizer_hash(tokenizer)]
    found.update(json.dumps(parts, sort_keys=True).encode())
    return found.hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """Of what a tokenizer does, not of its name or of how its file is written: two folders with the same one are equal."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("version", "truncation", "padding", "post_processor"):
        content.pop(name, None)
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def read_tokens(rows: Sequence[Row], tokenizer, ends: Sequence[int], recipe: Recipe, report: Report, cache: Path) -> TokenRows:
    """`tokenize`, done once: token rows and the report's additions are kept in `cache` under their content's hash."""
    name = cache_key(rows, tokenizer, ends, recipe)
    stored, notes = cache / f"{name}.safetensors", cache / f"{name}.json"
    if stored.exists() and notes.exists():
        for place, reason in json.loads(notes.read_text(encoding="utf-8")):
            report.refuse(place, reason)
        return TokenRows.load(stored)
    refused: list[tuple[str, str]] = []

    class Noting(Report):
        def refuse(self, place: str, reason: str) -> None:
            refused.append((place, reason))
            report.refuse(place, reason)

    made = tokenize(rows, tokenizer, ends, recipe, Noting())
    cache.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(refused, ensure_ascii=False), encoding="utf-8")
    made.save(stored)
    return made

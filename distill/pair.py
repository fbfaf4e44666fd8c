"""Do student and teacher belong together? Tokenizer, template, special and end tokens, weights."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from distill import models
from distill.errors import DistillError
from distill.recipe import ADAPTER_OFF, Recipe
from distill.tokens import end_tokens, tokenizer_hash


def check_pair(recipe: Recipe, tokenizer, ends: Sequence[int]) -> list[str]:
    """Raises DistillError with both values when tokenizers, templates, special tokens or end tokens differ.

    Gives a sentence per difference that the recipe accepts.
    """
    accepted: list[str] = []
    if recipe.teacher == ADAPTER_OFF:
        if not recipe.lora_rank:
            raise DistillError("teacher is adapter-off, but lora_rank is 0: there is no adapter to switch off; set lora_rank.")
        return accepted
    other = models.load_tokenizer(recipe.teacher, "teacher")
    theirs = end_tokens(other, models.generation_ends(recipe.teacher))
    if tokenizer_hash(tokenizer) != tokenizer_hash(other):
        words, words_there = tokenizer.get_vocab(), other.get_vocab()
        first = next(
            (word for word in sorted(words.keys() | words_there.keys()) if words.get(word) != words_there.get(word)), None
        )
        where = f"; {first!r} is token {words.get(first)} there and {words_there.get(first)} here" if first else ""
        raise DistillError(
            f"Student and teacher have different tokenizers ({len(words)} and {len(words_there)} tokens{where}); "
            "GKD compares token by token and needs one tokenizer."
        )
    for what, ours, there in (
        ("chat template", tokenizer.chat_template, other.chat_template),
        ("special tokens", sorted(tokenizer.all_special_tokens), sorted(other.all_special_tokens)),
        ("end tokens", named(tokenizer, ends), named(tokenizer, theirs)),
    ):
        if ours != there and what in recipe.accept:
            accepted.append(f"accepted: student and teacher differ in their {what}: {shorten(ours)} and {shorten(there)}")
        elif ours != there:
            raise DistillError(
                f"Student and teacher differ in their {what}: {shorten(ours)} and {shorten(there)}; make them equal first "
                f"(or answers begin or end where the other model does not expect it), or say accept: [{what}]."
            )
    return accepted


def named(tokenizer, ends: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in ends)


def shorten(value: object) -> str:
    text = repr(value)
    return (
        text
        if len(text) < 300
        else f"{text[:120]}...{text[-60:]} (hash {hashlib.blake2b(text.encode(), digest_size=4).hexdigest()})"
    )


def are_identical(student: nn.Module, teacher: nn.Module) -> bool:
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    return ours.keys() == theirs.keys() and all(
        a.shape == theirs[name].shape and torch.equal(a.detach().cpu().to(theirs[name].dtype), theirs[name].detach().cpu())
        for name, a in ours.items()
    )

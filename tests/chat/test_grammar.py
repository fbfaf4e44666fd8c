"""Answers that are JSON of a given schema, on llama.cpp: `pytest tests/chat/test_grammar.py`

The model is random, so nothing but the grammar makes its answers JSON.
"""

import json
import threading
from contextlib import closing

import pytest

from chat.engine import BadRequest, Chunk, Message, Sampling
from chat.gguf import GgufEngine, open_gguf
from chat.grammar import MOST, gbnf

ASK = [Message("user", "Tell me something.")]
TREE = {
    "$ref": "#/$defs/item",
    "$defs": {
        "item": {
            "type": "object",
            "properties": {
                "char": {"type": "integer"},
                "item": {"anyOf": [{"$ref": "#/$defs/item"}, {"type": "null"}]},
            },
            "required": ["char", "item"],
        }
    },
}
PERSON = {
    "type": "object",
    "properties": {
        'na"me é😀': {"type": "string", "minLength": 2, "maxLength": 12},
        "kind": {"enum": ["a\\b", 'q"q', "ü\n", 3, None]},
        "born": {"type": "string", "format": "date"},
        "marks": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ['na"me é😀', "kind", "marks"],
}


@pytest.fixture(scope="module")
def engine(tiny_gguf):
    with closing(open_gguf(tiny_gguf, context=2048, kv="f32", threads=1)) as engine:
        yield engine


def answer(engine: GgufEngine, schema: object, **sampling: object) -> tuple[str, Chunk]:
    wild = {"temperature": 2.0, "top_p": 1.0, "top_k": 0, "max_tokens": 400} | sampling
    chunks = list(engine.stream(ASK, Sampling(schema=json.dumps(schema), **wild)))
    return "".join(chunk.text for chunk in chunks if chunk.kind == "answer"), chunks[-1]


def whole(engine: GgufEngine, schema: object, **sampling: object) -> list[object]:
    """What ten seeds wrote, where the limit did not cut it."""
    told = [answer(engine, schema, seed=seed, **sampling) for seed in range(10)]
    return [json.loads(text) for text, last in told if last.finish == "stop"]


def test_an_answer_has_the_fields_and_types_of_its_schema(engine):
    said = whole(engine, PERSON)
    assert len(said) == 10
    for person in said:
        assert set(PERSON["required"]) <= set(person) <= set(PERSON["properties"])
        name = person['na"me é😀']
        assert "�" in name or 2 <= len(name) <= 12, "bytes that are no character count differently"
        assert person["kind"] in PERSON["properties"]["kind"]["enum"]
        assert 1 <= len(person["marks"]) <= 3 and all(isinstance(mark, bool) for mark in person["marks"])
    assert len({json.dumps(person) for person in said}) > 5, "the seeds choose"


def test_a_schema_may_hold_itself_under_a_name_that_the_grammar_uses_too(engine):
    for tree in whole(engine, TREE):
        while tree is not None:
            assert set(tree) == {"char", "item"} and isinstance(tree["char"], int)
            tree = tree["item"]


def test_any_object_is_json_to_the_last_character(engine):
    """Strings of a random model hold every kind of character."""
    said = whole(engine, {"type": "object"}, max_tokens=1500)
    assert said and all(isinstance(one, dict) for one in said)


def test_an_answer_that_the_limit_cuts_says_so(engine):
    text, last = answer(engine, PERSON, max_tokens=3)
    assert last.finish == "length" and last.stats.completion == 3
    with pytest.raises(ValueError):
        json.loads(text)


def test_the_end_comes_when_the_json_is_whole_and_not_before(engine):
    for seed in range(20):
        text, last = answer(engine, {"enum": ["yes", "no"]}, seed=seed)
        assert last.finish == "stop" and json.loads(text) in ("yes", "no")


def test_temperature_zero_and_a_penalty_are_held_too(engine):
    for sampling in ({"temperature": 0.0}, {"repetition_penalty": 1.8}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.01}):
        text, last = answer(engine, PERSON, seed=1, **sampling)
        assert last.finish == "stop" and json.loads(text)
    assert answer(engine, PERSON, temperature=0.0)[0] == answer(engine, PERSON, temperature=0.0, seed=9)[0]


def test_equal_seeds_give_equal_json(engine):
    assert answer(engine, PERSON, seed=4)[0] == answer(engine, PERSON, seed=4)[0]


def test_a_thought_is_free_and_the_answer_behind_it_is_json(tiny_gguf):
    from chat.llama import Model
    from chat.sampler import _Form

    class Words:
        """A chain that draws what it is told to, unless that is forbidden; then the most likely."""

        def __init__(self, wanted):
            self.wanted = wanted

    with closing(Model(tiny_gguf, vocabulary_only=True)) as model:
        thought = [model.added["<think>"], *model.tokenize("not { json"), model.added["</think>"]]
        form = _Form(model, '{"enum": [7]}', thinking=True)
        said = [_drawn(form, model, token) for token in [*thought, *model.tokenize("\n\n"), *model.tokenize("no")]]
        form.close()
        assert said[: len(thought)] == thought
        assert b"".join(map(model.piece, said[len(thought) :])).strip() == b"7"


def _drawn(form, model, token: int) -> int:
    """What the form makes of logits that want `token`, by the best word."""
    import ctypes

    from llama_cpp import llama_cpp as C

    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
    logits = (ctypes.c_float * model.vocabulary)(*([0.0] * model.vocabulary))
    logits[token] = 9.0
    try:
        return form.draw(chain, ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)))
    finally:
        C.llama_sampler_free(chain)


def test_a_thought_cannot_be_the_end(tiny_gguf):
    from chat.llama import Model
    from chat.sampler import _Form

    with closing(Model(tiny_gguf, vocabulary_only=True)) as model:
        form = _Form(model, '{"enum": [7]}', thinking=True)
        assert _drawn(form, model, model.added["<think>"]) == model.added["<think>"]
        for end in model.end_tokens:
            assert not model.ends(_drawn(form, model, end))
        form.close()


def test_others_write_beside_an_answer_that_is_held(engine):
    free = Sampling(temperature=1.0, seed=5, max_tokens=60)
    alone = "".join(chunk.text for chunk in engine.stream(ASK, free))
    held: list[str] = []
    threads = [
        threading.Thread(target=lambda seed=seed: held.append(answer(engine, PERSON, seed=seed)[0])) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    assert "".join(chunk.text for chunk in engine.stream(ASK, free)) == alone
    for thread in threads:
        thread.join(60)
    assert len(held) == 4 and all(json.loads(text) for text in held)


def test_the_longest_counts_do_not_overflow_a_small_stack(engine):
    """llama.cpp parses counts inside each other; threads of macOS have 512 KB."""
    schema = {"type": "string", "minLength": 0, "maxLength": MOST}
    said: list[str] = []
    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=lambda: said.append(answer(engine, schema)[0]))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join(60)
    assert said


REFUSED = {
    "patternProperties": {"type": "object", "patternProperties": {}},
    "pattern": {"type": "string", "pattern": "^a$"},
    "minimum": {"type": "integer", "minimum": 3},
    "oneOf": {"oneOf": [{"type": "integer"}]},
    "email": {"type": "string", "format": "email"},
    "beside": {"enum": [{}], "properties": {"a": {"type": "null"}}},
    "several types": {"type": ["string", "null"], "enum": ["a"]},
    "requires 'b'": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]},
    "further ones": {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": True},
    "without saying what": {"type": "array", "minItems": 2},
    "in order": {"type": "string", "minLength": 5, "maxLength": 2},
    str(MOST): {"type": "string", "maxLength": 100_000},
    "must be an object": [1],
    "type is 'strin'": {"type": "strin"},
    "example.com": {"$ref": "https://example.com/schema"},
    "zzz": {"$ref": "#/$defs/zzz"},
    "recursion": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "empty": {"type": "array", "items": {}},
    "levels deep": None,
    "characters": {"description": "x" * 40_000},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_to_is_refused_before_anything_is_read(engine, reason):
    schema = REFUSED[reason]
    if schema is None:
        schema = {"type": "null"}
        for _ in range(40):
            schema = {"type": "array", "items": schema}
    with pytest.raises(BadRequest, match=reason):
        next(engine.stream(ASK, Sampling(schema=json.dumps(schema))))
    assert answer(engine, {"enum": [1]})[0].strip() == "1", "the engine goes on"


@pytest.mark.parametrize(
    "schema",
    ['{"type"', "5", '{"enum": 5}', '{"anyOf": 5}', '{"$defs": 5}', '{"properties": 5}', '{"required": 5}', '{"$ref": 5}'],
)
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(BadRequest):
        gbnf(schema)


def test_an_unfinished_answer_is_not_held(engine):
    with pytest.raises(BadRequest, match="unfinished"):
        next(engine.stream([*ASK, Message("assistant", "Well")], Sampling(schema="{}")))


def test_engines_without_grammars_refuse_a_schema():
    from chat.scripted import ScriptedEngine

    with pytest.raises(BadRequest, match="Only llama"):
        next(ScriptedEngine().stream(ASK, Sampling(schema="{}")))

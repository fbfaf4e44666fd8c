"""A JSON schema -> the grammar that holds a model to it, in llama.cpp's language (GBNF): `gbnf('{"type": "object"}')`.

llama-cpp-python's converter does the work. Around it stands what it lacks: it drops in silence what it does not know, so every
keyword is looked at first; its strings may hold raw line breaks, and its literals break at quotes, so both are made right.
"""

import json
from typing import Any

from llama_cpp.llama_grammar import BuiltinRule, SchemaConverter

from chat.engine import BadRequest

LONGEST = 32_000  # characters of a schema
DEEPEST = 24  # schemas inside schemas
MOST = 256  # items or characters that can be counted: llama.cpp parses one count inside the other
FORMS = (  # a schema is one of these; the converter heeds only the first that it finds
    ("$ref",),
    ("anyOf",),
    ("const",),
    ("enum",),
    ("properties", "required", "additionalProperties"),
    ("items", "minItems", "maxItems"),
    ("prefixItems",),
    ("format",),
    ("minLength", "maxLength"),
)
REMARKS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
REMARKS |= {"$schema", "$id", "$comment", "$defs", "definitions"}
KNOWN = REMARKS | {"type"} | {keyword for form in FORMS for keyword in form}
TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
FORMATS = {"uuid", "date", "time", "date-time"}


def gbnf(schema: str) -> tuple[str, str, str]:
    """(grammar, its root, its root behind a thought, where line breaks may come first).

    Raises BadRequest with the keyword that cannot be kept to. Nothing is fetched: references stay inside the schema.
    """
    if len(schema) > LONGEST:
        raise BadRequest(f"The JSON schema has {len(schema):,} characters; at most {LONGEST:,} can be kept to.")
    try:
        asked = json.loads(schema)
        _check(asked, "the schema", 0)
        asked = _with_plain_references(asked)
        converter = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        converter.visit(converter.resolve_refs(asked, "here"), "")
    except (ValueError, AssertionError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise BadRequest(f"The JSON schema cannot be kept to ({exc or type(exc).__name__}): write a simpler one.") from exc
    behind = "behind"
    while behind in converter.rules:
        behind += "-"
    return converter.format_grammar() + f'\n{behind} ::= "\\n"? "\\n"? root\n', "root", behind


class _Converter(SchemaConverter):
    """The library's, with strings and literals that are JSON."""

    @property
    def rules(self) -> dict[str, str]:
        return self._rules

    def _format_literal(self, literal: str) -> str:
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def _add_primitive(self, name: str, rule: BuiltinRule) -> str:
        if name == "char":
            rule = BuiltinRule(rule.content.replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'))
        return super()._add_primitive(name, rule)


def _check(schema: Any, place: str, depth: int) -> None:
    """Raises BadRequest where the converter would give up, or give in."""
    if not isinstance(schema, dict):
        raise BadRequest(f"In the JSON schema {place} is {json.dumps(schema)[:40]}; it must be an object.")
    if depth > DEEPEST:
        raise BadRequest(f"The JSON schema is more than {DEEPEST} levels deep: make it flatter.")
    if unknown := sorted(set(schema) - KNOWN):
        raise BadRequest(f"The JSON schema's {unknown[0]!r} (in {place}) cannot be kept to here: leave it out.")
    forms = [form for form in FORMS if any(keyword in schema for keyword in form)]
    if len(forms) > 1:
        one, other = (next(keyword for keyword in form if keyword in schema) for form in forms[:2])
        raise BadRequest(f"The JSON schema has {one!r} beside {other!r} (in {place}), and only one can be kept to: use anyOf.")
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if wrong := [kind for kind in kinds if kind not in TYPES]:
        raise BadRequest(f"The JSON schema's type is {wrong[0]!r} (in {place}); it must be one of {', '.join(sorted(TYPES))}.")
    if isinstance(schema.get("type"), list) and forms:
        raise BadRequest(f"The JSON schema has several types beside {forms[0][0]!r} (in {place}): use anyOf.")
    _check_object(schema, place)
    if "items" not in schema and ("minItems" in schema or "maxItems" in schema):
        raise BadRequest(f"The JSON schema counts items without saying what they are (in {place}): add 'items'.")
    for low, high in (("minItems", "maxItems"), ("minLength", "maxLength")):
        counts = [schema.get(low, 0), schema.get(high, MOST)]
        if not all(type(count) is int and 0 <= count <= MOST for count in counts) or counts[0] > counts[1]:
            raise BadRequest(f"The JSON schema's {low} and {high} (in {place}) must be whole numbers up to {MOST}, in order.")
    if schema.get("format", "date") not in FORMATS:
        raise BadRequest(
            f"The JSON schema's format {schema['format']!r} cannot be kept to: only {', '.join(sorted(FORMATS))}."
        )
    for keyword in ("properties", "$defs", "definitions"):
        for name, inner in dict(schema.get(keyword, {})).items():
            _check(inner, f"{keyword} {name!r}", depth + 1)
    for keyword in ("anyOf", "prefixItems"):
        if keyword in schema and not schema[keyword]:
            raise BadRequest(f"The JSON schema's {keyword!r} is empty (in {place}): say what may stand there.")
        for number, inner in enumerate(schema.get(keyword, [])):
            _check(inner, f"{keyword} {number}", depth + 1)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), bool) and keyword == "additionalProperties":
            continue
        if keyword in schema:
            if not schema[keyword]:
                raise BadRequest(f"The JSON schema's {keyword!r} is empty (in {place}): say what may stand there.")
            _check(schema[keyword], keyword, depth + 1)


def _check_object(schema: dict[str, Any], place: str) -> None:
    known = schema.get("properties", {})
    if missing := [name for name in schema.get("required", []) if name not in known]:
        raise BadRequest(
            f"The JSON schema requires {missing[0]!r} (in {place}) without saying what it is: add it to 'properties'."
        )
    if known and schema.get("additionalProperties"):
        raise BadRequest(
            f"The JSON schema has 'properties' and further ones (in {place}): additionalProperties must be false."
        )


def _with_plain_references(schema: dict[str, Any]) -> dict[str, Any]:
    """Definitions under names that no property has: the converter names its rules after both."""
    prefix = "ref"
    while prefix in json.dumps(_names(schema)):
        prefix += "x"
    places = {
        f"#/{keyword}/{name}": (f"{prefix}{number}", inner)
        for keyword in ("$defs", "definitions")
        for number, (name, inner) in enumerate(schema.get(keyword, {}).items(), start=1000 * (keyword == "definitions"))
    }

    def renamed(part: Any) -> Any:
        if isinstance(part, list):
            return [renamed(one) for one in part]
        if not isinstance(part, dict):
            return part
        if isinstance(part.get("$ref"), str):
            return {"$ref": f"#/$defs/{places[part['$ref']][0]}"}
        return {name: one if name in ("const", "enum") else renamed(one) for name, one in part.items()}

    for keyword in ("$defs", "definitions"):
        schema = {name: part for name, part in schema.items() if name != keyword}
    # Inside anyOf, since the converter does not look beside a reference.
    return {"anyOf": [renamed(schema)], "$defs": {new: renamed(inner) for new, inner in places.values()}}


def _names(part: Any) -> list[str]:
    if isinstance(part, dict):
        return [*part, *(name for one in part.values() for name in _names(one))]
    return [name for one in part for name in _names(one)] if isinstance(part, list) else []

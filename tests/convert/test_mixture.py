"""Types and bytes, judged by llama.cpp itself."""

import numpy as np
import pytest

from convert.mixture import MIXTURES
from convert.run import convert
from tests.convert import oracle
from tests.tiny import write_checkpoint

# wide: rows for every K-quant; narrow: the fallback types; odd: not even 32 divides some rows, so F16
SHAPES = {
    "wide": {"hidden": 256, "intermediate": 512, "layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 32},
    "deep": {"hidden": 64, "intermediate": 256, "layers": 17, "heads": 4, "kv_heads": 2, "head_dim": 64},
    "bundled": {"hidden": 192, "intermediate": 512, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 32, "vocabulary": 400},
    "narrow": {},
    "odd": {"hidden": 48, "intermediate": 80, "heads": 4, "kv_heads": 2, "head_dim": 16},
    "untied": {"hidden": 256, "intermediate": 256, "layers": 9, "heads": 8, "kv_heads": 4, "head_dim": 32, "tied": False},
}
QUANTIZED = [name for name in MIXTURES if name not in ("F32", "BF16")]


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    """A checkpoint, its BF16 GGUF, and every type of ours made in one reading."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_checkpoint(folder / "source", **SHAPES[request.param])
    made = convert(source, folder / "{quant}.gguf", quant=tuple(MIXTURES), threads=2, verify="none")
    return folder, {result.quant: result.path for result in made}


@pytest.mark.parametrize("quant", QUANTIZED)
def test_types_are_those_of_llama_cpps_dry_run(model, quant):
    _, made = model
    ours = {name: kind for name, (kind, _) in oracle.tensors(made[quant]).items()}
    assert ours == oracle.planned(made["BF16"], int(MIXTURES[quant].file_type))


@pytest.mark.parametrize("quant", QUANTIZED)
def test_tensors_are_those_of_llama_cpps_quantizer_byte_for_byte(model, quant):
    folder, made = model
    theirs = oracle.quantized(made["BF16"], folder / "theirs.gguf", int(MIXTURES[quant].file_type))
    ours, judged = oracle.tensors(made[quant]), oracle.tensors(theirs)
    assert list(ours) == list(judged), "the order of the file"
    assert [name for name in ours if ours[name] != judged[name]] == []


def test_importance_changes_the_plan_as_it_does_in_llama_cpp(model):
    from convert.mixture import Plan
    from convert.source import read_source

    folder, made = model
    source = read_source(folder / "source")
    for quant in QUANTIZED:
        plan = Plan(
            MIXTURES[quant], source.shape.layers, source.shape.heads // source.shape.kv_heads, source.tied, importance=True
        )
        ours = {name: plan.type_of(name, weight.shape).name.lower() for name, weight in source.weights.items()}
        assert ours == oracle.planned(made["BF16"], int(MIXTURES[quant].file_type), importance={}), quant


def test_bf16_copies_the_stored_bits(model):
    from convert.source import read_source

    folder, made = model
    written = oracle.tensors(made["BF16"])
    for name, weight in read_source(folder / "source").weights.items():
        kind, data = written[name]
        stored = weight.stored(0, weight.rows)
        assert data == (stored if kind == "bf16" else (stored.astype(np.uint32) << 16)).tobytes()

"""The importance matrix: equal to what llama.cpp's graph shows, and used as llama.cpp uses it."""

import gguf
import numpy as np
import pytest

from convert.errors import ConvertError
from convert.importance import collect, read_importance
from convert.mixture import MIXTURES
from convert.progress import finish, relay, share_of
from convert.reference import Reference
from convert.run import convert
from convert.source import read_source
from tests.convert import oracle
from tests.tiny import write_checkpoint

QUANTS = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K", "Q8_0")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importance")
    return write_checkpoint(
        folder / "source", hidden=256, intermediate=256, layers=8, heads=4, kv_heads=1, head_dim=64, max_positions=512
    )


@pytest.fixture(scope="module")
def text(source):
    path = source.parent / "mine.txt"
    path.write_text("\n\n".join(f"Paragraph {i}: the quick brown fox, 你好 and so on." for i in range(40)))
    return path


@pytest.fixture(scope="module")
def made(source, text):
    """Every type in one pass, with a matrix collected on `text`."""
    results = convert(source, source.parent / "{quant}.gguf", quant=("F32", *QUANTS), imatrix=text, verify="none")
    return {result.quant: result.path for result in results}


def kept(source):
    return source.parent / "F32.imatrix.gguf"


def test_mean_squares_are_those_of_llama_cpps_own_graph(source, made):
    reference = Reference(read_source(source))
    windows = [np.random.default_rng(i).integers(0, 380, 64) for i in range(5)]
    found = finish(relay(collect(reference, windows, "x", "x"), share_of("importance")), None)
    ours, theirs = found.weights(), oracle.mean_squares(made["F32"], windows)
    assert ours.keys() == theirs.keys() and len(ours) == 7 * 8
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
    assert set(found.counts.values()) == {5 * 64}


@pytest.mark.parametrize("quant", QUANTS)
def test_bytes_with_a_matrix_are_those_of_llama_cpps_quantizer(source, made, quant, tmp_path):
    columns = {name: weight.columns for name, weight in read_source(source).weights.items()}
    weights = read_importance(kept(source), columns)[0].weights()
    theirs = oracle.quantized(made["F32"], tmp_path / "theirs.gguf", int(MIXTURES[quant].file_type), weights)
    ours, judged = oracle.tensors(made[quant]), oracle.tensors(theirs)
    assert [name for name in ours if ours[name] != judged[name]] == []


def test_the_matrix_changes_the_bytes_and_is_noted_in_the_file(source, made, tmp_path):
    plain = convert(source, tmp_path / "plain.gguf", quant=("Q4_K_M",), verify="none")[0].path
    assert oracle.tensors(plain) != oracle.tensors(made["Q4_K_M"])
    fields = gguf.GGUFReader(made["Q4_K_M"]).fields
    assert fields["quantize.imatrix.dataset"].contents() == "mine.txt"
    assert fields["quantize.imatrix.entries_count"].contents() == 56
    assert "quantize.imatrix.file" not in gguf.GGUFReader(plain).fields


def test_the_file_has_what_llama_quantize_requires_of_one(source, made):
    reader = gguf.GGUFReader(kept(source))
    assert reader.fields["general.type"].contents() == "imatrix" and "general.architecture" not in reader.fields
    assert reader.fields["imatrix.datasets"].contents() == ["mine.txt"]
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.ffn_down.weight.in_sum2", "blk.0.ffn_down.weight.counts"} <= names
    assert not any("token_embd" in name for name in names)


def test_a_kept_matrix_is_used_again_and_may_be_given_by_name(source, text, made, tmp_path):
    before = kept(source).stat().st_mtime_ns
    again = convert(source, source.parent / "{quant}.gguf", quant=("F32", "Q4_K_M"), imatrix=text, verify="none", force=True)
    assert kept(source).stat().st_mtime_ns == before
    given = convert(source, tmp_path / "given.gguf", quant=("Q4_K_M",), imatrix=kept(source), verify="none")[0]
    assert oracle.tensors(given.path) == oracle.tensors(again[1].path)


def test_a_matrix_of_another_model_is_refused(source, made, tmp_path):
    other = write_checkpoint(tmp_path / "other")
    with pytest.raises(ConvertError, match="another model"):
        convert(other, tmp_path / "out.gguf", imatrix=kept(source), verify="none")


def test_a_file_that_is_no_matrix_is_refused(source, made, tmp_path):
    with pytest.raises(ConvertError, match="not an importance matrix"):
        convert(source, tmp_path / "out.gguf", imatrix=made["F32"], verify="none")

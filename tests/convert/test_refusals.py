"""Every bad input ends in one sentence that names what was found, and leaves nothing under the final name."""

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from convert.__main__ import main
from convert.errors import ConvertError
from convert.run import convert
from tests.tiny import write_checkpoint, write_json, write_safetensors

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", shards=3)


def refused(source, *words, quant=("Q8_0",), **options):
    """The sentence, which must hold all of `words`; nothing may be left under the final name."""
    out = source.parent / "out.gguf"
    with pytest.raises(ConvertError) as caught:
        convert(source, out, quant=quant, verify="none", **options)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert not out.exists()
    return text


def edit(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def test_a_missing_directory_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "neither a directory")


def test_a_file_instead_of_a_directory_is_refused(source):
    refused(source / "config.json", "config.json", "neither a directory")


def test_another_architecture_is_refused_by_name_before_its_weights_are_opened(source):
    edit(source / "config.json", architectures=["Qwen3MoeForCausalLM"])
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    refused(source, "Qwen3MoeForCausalLM")


def test_quantized_weights_are_refused_by_method(source):
    edit(source / "config.json", quantization_config={"quant_method": "gptq"})
    refused(source, "gptq")


def test_an_unknown_scaling_of_positions_is_refused(source):
    edit(source / "config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e6, "factor": 4.0})
    refused(source, "longrope")


def test_a_configuration_without_theta_is_refused(source):
    edit(source / "config.json", rope_parameters=None)
    refused(source, "rope_theta")


def test_a_missing_shard_is_named(source):
    (source / SHARD).unlink()
    refused(source, SHARD, "missing")


@pytest.mark.parametrize("keep", [3, 60, -1])
def test_a_truncated_shard_is_named(source, keep):
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[:keep])
    refused(source, SHARD, "cut off")


def test_a_shard_that_is_no_safetensors_is_named(source):
    (source / SHARD).write_bytes(struct.pack("<Q", 20) + b"not json at all, no.")
    refused(source, SHARD, "safetensors header")


def test_index_and_shards_that_disagree_are_refused(source):
    index = source / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    name = next(name for name, file in placed.items() if file == SHARD)
    edit(index, weight_map=placed | {name: "model-00001-of-00003.safetensors"})
    refused(source, name, SHARD)


def test_an_index_that_promises_more_is_refused(source):
    index = source / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=placed | {"model.layers.9.mlp.up_proj.weight": SHARD})
    refused(source, "model.layers.9.mlp.up_proj.weight", SHARD)


def test_an_index_that_points_outside_is_refused(source):
    index = source / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=placed | {"x": "../other.safetensors"})
    refused(source, "outside")


def rewrite(source, dtype="BF16", **changes):
    """A single-file checkpoint with tensors replaced (None: dropped)."""
    from convert.weights import read_weights

    tensors = {name: weight.float32(0, weight.rows).reshape(weight.shape) for name, weight in read_weights(source).items()}
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    for file in (*source.glob("*.safetensors"), source / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    write_safetensors(source / "model.safetensors", tensors, dtype)
    return tensors


def test_a_missing_tensor_is_named(source):
    rewrite(source, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(source, "model.layers.1.mlp.up_proj.weight")


def test_a_wrong_shape_is_named_with_both_shapes(source):
    rewrite(source, **{"model.layers.1.mlp.up_proj.weight": np.zeros((128, 32), np.float32)})
    refused(source, "model.layers.1.mlp.up_proj.weight", "[128, 32]", "[128, 64]")


def test_a_tensor_without_a_place_is_named(source):
    rewrite(source, **{"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)})
    refused(source, "model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32"])
def test_a_foreign_dtype_is_named(source, dtype):
    data = (source / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["dtype"] = dtype
    head = json.dumps(header).encode()
    (source / SHARD).write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    refused(source, SHARD, name, dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nan_and_infinity_are_named_by_tensor_and_row(source, bad, dtype):
    from convert.weights import read_weights

    name = "model.layers.1.mlp.up_proj.weight"
    weight = read_weights(source)[name]
    values = weight.float32(0, weight.rows)
    values[77, 5] = bad
    rewrite(source, dtype, **{name: values})
    for quant in ("Q8_0", "BF16"):
        refused(source, name, "row 77", "column 5", "--allow-nan", quant=(quant,))


def test_nan_is_converted_when_allowed(source, tmp_path):
    rewrite(source, **{"model.layers.1.mlp.up_proj.weight": np.full((128, 64), np.nan, np.float32)})
    made = convert(source, tmp_path / "out.gguf", quant=("Q8_0",), verify="none", allow_nan=True)
    assert made[0].path.stat().st_size == made[0].size


def test_numbers_too_large_for_f16_are_refused(source):
    rewrite(source, **{"model.layers.1.mlp.up_proj.weight": np.full((128, 64), 1e6, np.float32)})
    refused(source, "model.layers.1.mlp.up_proj.weight", "F16", quant=("F16",))


def test_a_foreign_tokenizer_is_refused_before_weights_are_read(source):
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    write_json(file, content)
    refused(source, "tokenizer.json", r"\\s+")


def test_a_sentencepiece_tokenizer_is_refused(source):
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["type"] = "Unigram"
    write_json(source / "tokenizer.json", content)
    refused(source, "Unigram")


def test_a_model_without_a_tokenizer_is_refused(source):
    (source / "tokenizer.json").unlink()
    refused(source, "tokenizer.json", "missing")


@pytest.mark.parametrize("layout", ["transformers4", "transformers5"])
def test_a_model_without_a_template_is_refused(tmp_path, layout):
    refused(write_checkpoint(tmp_path / "bare", layout=layout, template=""), "chat template")


def test_an_end_token_that_does_not_exist_is_refused(source):
    edit(source / "tokenizer_config.json", eos_token="<|nothing|>")
    refused(source, "<|nothing|>", "eos_token")


def test_more_ends_than_a_gguf_can_state_are_refused(source):
    edit(source / "generation_config.json", eos_token_id=[393, 5, 6])
    refused(source, "[5, 6]")


def test_an_existing_file_is_not_overwritten_without_force(source, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(ConvertError, match="--force"):
        convert(source, out, quant=("Q8_0",), verify="none")
    assert out.read_text() == "mine"
    convert(source, out, quant=("Q8_0",), verify="none", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_several_types_need_several_names(source, tmp_path):
    with pytest.raises(ConvertError, match=r"\{quant\}"):
        convert(source, tmp_path / "out.gguf", quant=("Q8_0", "BF16"), verify="none")


def test_an_unknown_type_is_refused_with_the_known_ones(source):
    refused(source, "Q9_K", "Q4_K_M", quant=("Q9_K",))


def test_an_unknown_level_is_refused_at_once(source, tmp_path):
    with pytest.raises(ConvertError, match="thorough"):
        convert(source, tmp_path / "out.gguf", verify="thorough")


def test_too_little_disk_is_refused_before_anything_is_written(source, monkeypatch):
    usage = shutil.disk_usage(source)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    refused(source, "free")
    assert not list(source.parent.glob("*.part"))


def test_a_missing_output_directory_is_named(source, tmp_path):
    with pytest.raises(ConvertError, match="does not exist"):
        convert(source, tmp_path / "no" / "out.gguf", verify="none")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX limit on file sizes")
def test_a_disk_that_fills_up_in_the_middle_leaves_a_sentence_and_no_file(source, tmp_path):
    # A limit on file size makes write fail in the middle, as a full disk does.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out.gguf"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), "--quant", "BF16", "--verify", "none", "--quiet"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and not out.exists()
    assert "File too large" in ran.stderr and "goes on from there" in ran.stderr and "Traceback" not in ran.stderr
    assert main([str(source), str(out), "--quant", "BF16", "--verify", "none", "--quiet"]) == 0
    assert out.stat().st_size > 40_000


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere; Windows has other rules")
def test_a_read_only_directory_is_named(source, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(ConvertError, match="closed"):
        convert(source, closed / "out.gguf", verify="none")


def test_the_command_line_says_a_sentence_and_returns_one(source, tmp_path, capsys):
    (source / SHARD).unlink()
    assert main([str(source), str(tmp_path / "out.gguf"), "--json"]) == 1
    said = capsys.readouterr()
    assert SHARD in said.err and SHARD in json.loads(said.out)["error"]

"""A LoRA adapter merged in the stream gives what merging first gives."""

import json

import numpy as np
import pytest

from convert.errors import ConvertError
from convert.run import convert
from convert.weights import read_weights
from tests.tiny import write_checkpoint, write_json, write_safetensors

TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def write_adapter(directory, base, *, rank=4, alpha=16, name="base_model.model.{}.lora_{}.weight", **config):
    directory.mkdir()
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(2):
        for target in TARGETS:
            module = f"model.layers.{layer}.{target}"
            rows, columns = read_weights(base)[module + ".weight"].shape
            tensors[name.format(module, "A")] = random.standard_normal((rank, columns)).astype(np.float32) * 0.1
            tensors[name.format(module, "B")] = random.standard_normal((rows, rank)).astype(np.float32) * 0.1
    write_safetensors(directory / "adapter_model.safetensors", tensors, "F32")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none"}
    write_json(directory / "adapter_config.json", settings | {"base_model_name_or_path": str(base)} | config)
    return directory


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base")


def merged_first(base, adapter, scale):
    """The same checkpoint with the update added in float32, as F32 safetensors."""
    tensors = {name: w.float32(0, w.rows).reshape(w.shape) for name, w in read_weights(base).items()}
    updates = {name: w.float32(0, w.rows) for name, w in read_weights_of(adapter).items()}
    for name, a in updates.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            tensors[module + ".weight"] += np.float32(scale) * (updates[name.replace("lora_A", "lora_B")] @ a)
    write_safetensors(base / "model.safetensors", tensors, "F32")
    return base


def read_weights_of(adapter):
    from convert.weights import read_shard

    return read_shard(adapter / "adapter_model.safetensors")


PATTERN = {r"layers\.\d+\.self_attn\.[qo]_proj": 16, "mlp.down_proj": 16}


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 16 / 4), ({"use_rslora": True}, 16 / 2), ({"alpha_pattern": PATTERN, "lora_alpha": 1}, 4)],
    ids=["plain", "rank-stabilised", "pattern"],
)
@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_merging_in_the_stream_equals_merging_first(base, tmp_path, config, scale, quant):
    adapter = write_adapter(tmp_path / "adapter", base, **config)
    ours = convert(base, tmp_path / "ours.gguf", quant=(quant,), adapter=adapter, verify="none", name="x")[0]
    merged_first(base, adapter, scale)
    first = convert(base, tmp_path / "first.gguf", quant=(quant,), verify="none", name="x")[0]
    left, right = ours.path.read_bytes(), first.path.read_bytes()
    if quant == "F32":  # one addition may round differently from one multiplication of matrices to another
        floats = (np.frombuffer(data[-400_000:], "<f4") for data in (left, right))
        assert np.allclose(*floats, atol=1e-6)
    else:
        assert sum(a != b for a, b in zip(left, right, strict=True)) < len(left) / 1000
    assert any("merged into 6 matrices" in note for note in ours.notes)


def test_peft_agrees_about_the_merged_weights(base, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from convert.adapter import merge
    from convert.source import read_source

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "up_proj"], use_rslora=True, init_lora_weights=False
    )
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    theirs = tuned.merge_and_unload().state_dict()
    ours = merge(read_source(base), tmp_path / "adapter").weights
    for mine, name in (("attn_q", "self_attn.q_proj"), ("ffn_up", "mlp.up_proj"), ("attn_k", "self_attn.k_proj")):
        weight = ours[f"blk.1.{mine}.weight"]
        assert np.allclose(weight.float32(0, weight.rows), theirs[f"model.layers.1.{name}.weight"].numpy(), atol=1e-6)


def test_an_adapter_directory_is_a_source_and_finds_its_base(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    one = convert(adapter, tmp_path / "one.gguf", quant=("Q8_0",), verify="none", name="x")[0]
    two = convert(base, tmp_path / "two.gguf", quant=("Q8_0",), verify="none", name="x", adapter=adapter)[0]
    assert one.sha256 == two.sha256


def test_a_merged_file_is_verified_against_the_merged_weights(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    made = convert(base, tmp_path / "out.gguf", quant=("F32",), adapter=adapter, threads=1)[0]
    assert made.kld_mean < 1e-4
    manifest = json.loads(made.manifest.read_text())
    assert "adapter/adapter_model.safetensors" in manifest["source"]["files"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(base, tmp_path, config, said):
    adapter = write_adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(ConvertError, match=said):
        convert(base, tmp_path / "out.gguf", adapter=adapter, verify="none")


def test_an_adapter_of_another_base_is_refused_with_both_shapes(base, tmp_path):
    other = write_checkpoint(tmp_path / "other", hidden=128)
    adapter = write_adapter(tmp_path / "adapter", other)
    with pytest.raises(ConvertError, match="another base"):
        convert(base, tmp_path / "out.gguf", adapter=adapter, verify="none")


def test_an_adapter_for_more_layers_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    short = write_checkpoint(tmp_path / "short", layers=1)
    with pytest.raises(ConvertError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        convert(short, tmp_path / "out.gguf", adapter=adapter, verify="none")


def test_an_adapter_whose_base_is_not_here_says_how_to_name_it(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ConvertError, match="--adapter"):
        convert(adapter, tmp_path / "out.gguf", verify="none")


def test_a_pickled_adapter_is_not_read(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConvertError, match="pickle"):
        convert(base, tmp_path / "out.gguf", adapter=adapter, verify="none")

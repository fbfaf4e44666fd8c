"""Traps of Qwen3's files: each of them costs a wrong answer somewhere if it is missed."""

import json

import gguf
import pytest

from convert.llama import Model
from convert.run import convert
from convert.source import read_source
from convert.vocabulary import ENDS, read_vocabulary
from tests.tiny import TEMPLATE, tokenizer, write_checkpoint, write_json


def make(source, tmp_path, **options):
    return convert(source, tmp_path / "out.gguf", quant=("BF16",), verify="none", **options)[0]


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def edit(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source")


def test_both_layouts_of_transformers_give_the_same_file(tmp_path):
    made = []
    for layout in ("transformers4", "transformers5"):
        directory = write_checkpoint(tmp_path / layout, layout=layout)
        made.append(convert(directory, tmp_path / f"{layout}.gguf", quant=("Q8_0",), verify="none", name="one")[0])
    assert made[0].sha256 == made[1].sha256


def test_a_sharded_source_gives_the_same_file(tmp_path):
    made = [
        convert(
            write_checkpoint(tmp_path / str(shards), shards=shards), tmp_path / f"{shards}.gguf", verify="none", name="one"
        )[0]
        for shards in (1, 4)
    ]
    assert made[0].sha256 == made[1].sha256


def test_ids_and_flags_are_stated_and_llama_cpp_reads_them(source, tmp_path):
    built = tokenizer()
    end, im_end = built.token_to_id("<|endoftext|>"), built.token_to_id("<|im_end|>")
    path = make(source, tmp_path).path
    stated = fields(path)
    assert stated["tokenizer.ggml.add_bos_token"] is False
    with Model(path, vocabulary_only=True) as model:
        assert model.special() == {"eos": im_end, "eot": im_end, "bos": end, "padding": end}
        assert model.ends() == {end, im_end} and not model.adds()


def test_the_vocabulary_is_filled_to_the_rows_of_the_embedding(source, tmp_path):
    stated = fields(make(source, tmp_path).path)
    tokens, types = stated["tokenizer.ggml.tokens"], stated["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 416
    assert tokens[400:] == [f"[PAD{i}]" for i in range(400, 416)] and set(types[400:]) == {gguf.TokenType.UNUSED}
    by_text = dict(zip(tokens, types, strict=True))
    assert by_text["<|im_end|>"] == gguf.TokenType.CONTROL and by_text["<think>"] == gguf.TokenType.USER_DEFINED


def test_an_ordinary_entry_that_reads_like_an_end_is_blanked(source, tmp_path):
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"]["</s>"] = 405
    write_json(source / "tokenizer.json", content)
    result = make(source, tmp_path)
    assert "</s>" in ENDS and any("</s>" in note for note in result.notes)
    with Model(result.path, vocabulary_only=True) as model:
        assert 405 not in model.ends()
        assert model.tokenize("a</s>b", special=True) == model.tokenize("a</s>b", special=False)


def test_an_end_that_only_generation_config_knows_ends_answers(source, tmp_path):
    edit(source / "generation_config.json", eos_token_id=[393, 17])
    with Model(make(source, tmp_path).path, vocabulary_only=True) as model:
        assert {393, 17} <= model.ends()


@pytest.mark.parametrize("stated", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}])
def test_the_end_token_of_a_base_models_tokenizer_is_kept_and_im_end_still_ends_turns(source, tmp_path, stated):
    edit(source / "tokenizer_config.json", eos_token=stated)
    with Model(make(source, tmp_path).path, vocabulary_only=True) as model:
        assert (model.special()["eos"], model.special()["eot"]) == (391, 393)


@pytest.mark.parametrize("layout", ["transformers4", "transformers5"])
def test_the_template_is_carried_byte_for_byte(tmp_path, layout):
    text = "{# ünïcode\r\n #}" + TEMPLATE.read_text() + "\n\n"
    source = write_checkpoint(tmp_path / "source", layout=layout, template="x")
    if layout == "transformers5":
        (source / "chat_template.jinja").write_bytes(text.encode())
    else:
        edit(source / "tokenizer_config.json", chat_template=text)
    assert fields(make(source, tmp_path).path)["tokenizer.chat_template"] == text


def test_where_two_templates_differ_the_file_wins_as_in_transformers(source, tmp_path):
    edit(source / "tokenizer_config.json", chat_template="old")
    result = make(source, tmp_path)
    assert fields(result.path)["tokenizer.chat_template"] == TEMPLATE.read_text()
    assert any("chat_template.jinja" in note for note in result.notes)


def test_named_templates_are_carried_too(source, tmp_path):
    (source / "chat_template.jinja").unlink()
    both = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edit(source / "tokenizer_config.json", chat_template=both)
    stated = fields(make(source, tmp_path).path)
    assert stated["tokenizer.chat_template"] == "D" and stated["tokenizer.chat_template.tool_use"] == "T"


def test_shape_rope_and_recommended_sampling_are_carried(source, tmp_path):
    edit(source / "config.json", rope_parameters={"rope_theta": 5_000_000, "rope_type": "default"})
    edit(source / "generation_config.json", min_p=0.05, repetition_penalty=1.1)
    stated = fields(make(source, tmp_path).path)
    assert stated["qwen3.rope.freq_base"] == 5_000_000 and stated["qwen3.context_length"] == 2048
    assert stated["qwen3.attention.key_length"] == stated["qwen3.attention.value_length"] == 16
    assert stated["qwen3.attention.head_count"] == 4 and stated["qwen3.attention.head_count_kv"] == 2
    sampling = {key.removeprefix("general.sampling."): value for key, value in stated.items() if "sampling" in key}
    expected = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1}
    assert sampling == pytest.approx(expected)


def with_head(source, config_ties):
    """The checkpoint with lm_head.weight stored as a copy of the embedding."""
    from convert.weights import read_weights
    from tests.tiny import write_safetensors

    tensors = {name: w.float32(0, w.rows).reshape(w.shape) for name, w in read_weights(source).items()}
    write_safetensors(source / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    edit(source / "config.json", tie_word_embeddings=config_ties)


@pytest.mark.parametrize("config_ties", [True, False])
def test_an_identical_head_is_dropped_with_a_note(source, tmp_path, config_ties):
    with_head(source, config_ties)
    result = make(source, tmp_path)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(result.path).tensors}
    assert any("lm_head" in note for note in result.notes)


def test_a_head_of_its_own_is_kept(tmp_path):
    source = write_checkpoint(tmp_path / "untied", tied=False)
    result = make(source, tmp_path)
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(result.path).tensors}


def test_a_tied_head_with_other_numbers_is_dropped_and_told(tmp_path):
    source = write_checkpoint(tmp_path / "untied", tied=False)
    edit(source / "config.json", tie_word_embeddings=True)
    result = make(source, tmp_path)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(result.path).tensors}
    assert any("differ" in note for note in result.notes)


def test_licence_and_origin_come_from_the_card(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-4B\n---\n# x\n")
    stated = fields(make(source, tmp_path).path)
    assert stated["general.license"] == "apache-2.0" and stated["general.base_model.0.name"] == "Qwen3-4B"
    assert stated["general.base_model.0.repo_url"].endswith("Qwen/Qwen3-4B")


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_merges_are_read_in_both_forms(source, merges):
    content = json.loads((source / "tokenizer.json").read_text())
    if merges == "strings":
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        write_json(source / "tokenizer.json", content)
    assert read_vocabulary(read_source(source)).merges[0].count(" ") == 1

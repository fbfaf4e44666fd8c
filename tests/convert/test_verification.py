"""What verification finds: equal predictions where they are equal, and wrong files where they are wrong."""

import json
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest

from convert.dialogue import CALIBRATION, EVALUATION, Template, read_conversations, windows
from convert.divergence import compare, log_softmax, score
from convert.errors import ConvertError, Refused
from convert.llama import Model
from convert.manifest import manifest_path, read_manifest
from convert.parity import check_parity
from convert.progress import finish
from convert.recheck import Recheck, rechecking
from convert.reference import Reference
from convert.run import convert
from convert.source import read_source
from convert.verify import LEVELS, Level
from convert.vocabulary import encoder, read_vocabulary
from tests.tiny import write_checkpoint, write_json

SHAPE = {"hidden": 64, "intermediate": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """The machinery in full, on less text."""
    monkeypatch.setitem(LEVELS, "quick", Level(strings=200, window=64, windows=4))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "source", **SHAPE)


@pytest.fixture
def made(source, tmp_path):
    return {
        result.quant: result
        for result in convert(source, tmp_path / "{quant}.gguf", quant=("F32", "BF16", "Q8_0", "Q4_0"), threads=1)
    }


def logits_of(source, path, tokens):
    reference = Reference(source)
    *_, (hidden,) = reference.hidden([tokens])
    with Model(path, context=len(tokens)) as model:
        return reference.head(hidden), model.logits(tokens, 0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "default", "rope_theta": 5e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512},
    ],
    ids=lambda rope: f"{rope['rope_type']}-{rope['rope_theta']:g}",
)
@pytest.mark.parametrize("tied", [True, False])
def test_numpy_and_llama_cpp_predict_the_same(tmp_path, rope, tied):
    directory = write_checkpoint(tmp_path / "model", **SHAPE, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"rope_parameters": rope})
    path = convert(directory, tmp_path / "f32.gguf", quant=("F32",), verify="none")[0].path
    ours, theirs = logits_of(read_source(directory), path, np.random.default_rng(0).integers(0, 380, 200))
    p, q = log_softmax(ours), log_softmax(theirs)
    assert (np.exp(p) * (p - q)).sum(-1).mean() < 1e-5
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max()


def test_numpy_and_transformers_predict_the_same(source):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = np.random.default_rng(0).integers(0, 380, 200)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor(tokens[None])).logits[0].numpy()
    reference = Reference(read_source(source))
    *_, (hidden,) = reference.hidden([tokens])
    assert np.abs(reference.head(hidden) - theirs).max() < 1e-3


def test_windows_do_not_see_each_other(source):
    reference = Reference(read_source(source))
    tokens = np.random.default_rng(1).integers(0, 380, 48)
    *_, (alone,) = reference.hidden([tokens])
    *_, (_, beside) = reference.hidden([tokens[::-1], tokens])
    assert np.abs(alone - beside).max() < 1e-4


def test_the_more_bits_the_nearer(made):
    kld = {quant: result.kld_mean for quant, result in made.items()}
    assert 0 <= kld["F32"] < kld["Q8_0"] < kld["Q4_0"]
    assert kld["BF16"] < 1e-3 and made["BF16"].same_top > 0.95
    low, high = made["Q4_0"].kld_interval
    assert low < kld["Q4_0"] < high


def test_the_result_is_noted_in_the_manifest_and_in_the_file(made, source):
    result = made["Q4_0"]
    manifest = read_manifest(result.path)
    assert manifest["file"]["sha256"] == result.sha256
    assert manifest["verification"]["divergence"]["kld_mean"] == result.kld_mean
    assert manifest["verification"]["parity"]["strings"] > 200
    assert set(manifest["source"]["files"]) >= {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"}
    fields = gguf.GGUFReader(result.path).fields
    assert fields["convert.kld.mean"].contents() == pytest.approx(result.kld_mean, rel=1e-2)
    assert fields["convert.kld.tokens"].contents() == manifest["verification"]["divergence"]["tokens"] == 4 * 31


def test_a_file_that_was_not_verified_says_so(source, tmp_path):
    result = convert(source, tmp_path / "out.gguf", quant=("Q8_0",), verify="none")[0]
    assert result.kld_mean is None and read_manifest(result.path)["verification"] is None
    fields = gguf.GGUFReader(result.path).fields
    assert fields["convert.kld.tokens"].contents() == 0 and np.isnan(fields["convert.kld.mean"].contents())


def test_a_wrong_weight_is_found_before_the_file_gets_its_name(source, tmp_path, monkeypatch):
    from convert import stream

    honest = stream.Worker.run

    def wrong(self, slab):
        return [np.roll(data, 2) if "ffn_up" in slab.name else data for data in honest(self, slab)]

    monkeypatch.setattr(stream.Worker, "run", wrong)
    with pytest.raises(Refused, match="too far from its source"):
        convert(source, tmp_path / "out.gguf", quant=("BF16",), threads=1)
    assert not (tmp_path / "out.gguf").exists()


def test_a_users_limit_on_kld_is_kept(source, tmp_path):
    with pytest.raises(Refused, match="--max-kld"):
        convert(source, tmp_path / "out.gguf", quant=("Q4_0",), threads=1, max_kld=1e-6)
    assert not (tmp_path / "out.gguf").exists()
    assert convert(source, tmp_path / "out.gguf", quant=("Q4_0",), threads=1)[0].resumed > 0


def test_a_disk_that_gives_back_other_bytes_is_found(source, tmp_path, monkeypatch):
    from convert.partial import Partial

    honest = Partial.measured

    def rot(self, values):
        honest(self, values)
        slot = self.layout.slots[3]
        self._file.seek(slot.offset)
        self._file.write(b"rot")

    monkeypatch.setattr(Partial, "measured", rot)
    with pytest.raises(ConvertError, match="gives back other bytes"):
        convert(source, tmp_path / "out.gguf", quant=("Q8_0",), threads=1)
    assert not (tmp_path / "out.gguf").exists()


def test_verify_confirms_a_good_file_later_and_updates_the_manifest(made, source):
    result = made["Q4_0"]
    manifest_path(result.path).unlink()
    found = finish(rechecking(Recheck(result.path, source, threads=1)), None)
    assert found.divergence.kld_mean == pytest.approx(result.kld_mean)
    assert read_manifest(result.path)["file"]["sha256"] == result.sha256


def test_verify_against_an_unquantized_file_agrees_with_verify_against_the_weights(made, source):
    by_file = finish(rechecking(Recheck(made["Q4_0"].path, made["F32"].path, threads=1)), None)
    assert by_file.divergence.kld_mean == pytest.approx(made["Q4_0"].kld_mean, rel=0.05)


def test_verify_names_the_tensor_that_changed(made, source):
    path = made["Q8_0"].path
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    with path.open("r+b") as file:
        file.seek(tensor.data_offset + 40)
        file.write(b"\x55\x55\x55")
    with pytest.raises(Refused, match=r"blk\.1\.attn_q\.weight"):
        finish(rechecking(Recheck(path, source, threads=1)), None)


def test_verify_refuses_another_models_file(made, tmp_path):
    other = write_checkpoint(tmp_path / "other", **(SHAPE | {"layers": 3}))
    with pytest.raises(Refused, match=r"blk\.2"):
        finish(rechecking(Recheck(made["Q8_0"].path, other, threads=1)), None)


def damaged(path, key, kind, value):
    """The file with one number in its head replaced."""
    data = bytearray(path.read_bytes())
    at = data.index(len(key).to_bytes(8, "little") + key.encode()) + 8 + len(key) + 4
    struct.pack_into(kind, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("key", "kind", "value", "said"),
    [
        ("tokenizer.ggml.eos_token_id", "<I", 7, "eos"),
        ("tokenizer.ggml.eot_token_id", "<I", 391, "eot"),
        ("tokenizer.ggml.bos_token_id", "<I", 7, "bos"),
        ("tokenizer.ggml.add_bos_token", "<?", True, "adds a token"),
    ],
)
def test_a_wrong_special_id_is_found(source, tmp_path, key, kind, value, said):
    path = convert(source, tmp_path / "out.gguf", quant=("Q8_0",), verify="none")[0].path
    damaged(path, key, kind, value)
    checkpoint = read_source(source)
    with Model(path, vocabulary_only=True) as model, pytest.raises(Refused, match=said):
        check_parity(model, source / "tokenizer.json", read_vocabulary(checkpoint), 10)


def test_a_lost_merge_is_found(source, tmp_path):
    changed = tmp_path / "changed"
    write_checkpoint(changed, **SHAPE)
    content = json.loads((changed / "tokenizer.json").read_text())
    del content["model"]["merges"][5]
    write_json(changed / "tokenizer.json", content)
    path = convert(changed, tmp_path / "out.gguf", quant=("Q8_0",), verify="none")[0].path
    with Model(path, vocabulary_only=True) as model, pytest.raises(Refused, match="tokenizer differs"):
        check_parity(model, source / "tokenizer.json", read_vocabulary(read_source(source)), 500)


def test_a_changed_template_is_found(source, tmp_path):
    path = convert(source, tmp_path / "out.gguf", quant=("Q8_0",), verify="none")[0].path
    vocabulary = read_vocabulary(read_source(source))
    other = replace(vocabulary, templates={"default": vocabulary.template + " "})
    with Model(path, vocabulary_only=True) as model, pytest.raises(Refused, match="byte for byte"):
        check_parity(model, source / "tokenizer.json", other, 10)


def test_ten_thousand_strings_are_cut_as_the_models_own_tokenizer_cuts_them(made, source):
    with Model(made["BF16"].path, vocabulary_only=True) as model:
        found = check_parity(model, source / "tokenizer.json", read_vocabulary(read_source(source)), 10_000, seed=5)
    assert found.strings > 10_000


def test_scores_of_equal_predictions_are_zero_and_a_shift_changes_nothing():
    random = np.random.default_rng(0)
    logits = random.standard_normal((40, 100)).astype(np.float32) * 3
    same = score(logits, logits + 7, np.arange(40))
    assert np.abs(same.kld).max() < 1e-5 and same.same.all() and np.abs(same.delta_p).max() < 1e-6


def test_scores_agree_with_the_definition():
    random = np.random.default_rng(1)
    a, b = random.standard_normal((2, 5, 20))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    found = score(a.astype(np.float32), b.astype(np.float32), np.arange(5))
    assert found.kld == pytest.approx((p * np.log(p / q)).sum(-1), rel=1e-4)
    assert found.nll == pytest.approx(-np.log(q[np.arange(5), np.arange(5)]), rel=1e-4)


def test_several_files_are_compared_in_one_pass_of_the_base(made, source):
    checkpoint = read_source(source)
    encode = encoder(source / "tokenizer.json")
    cut = windows(encode, read_vocabulary(checkpoint).template, read_conversations(EVALUATION), 64, 3)
    with Model(made["Q8_0"].path, context=64) as one, Model(made["Q4_0"].path, context=64) as two:
        steps = compare(Reference(checkpoint), [one, two], cut)
        shares = []
        while True:
            try:
                shares.append(next(steps))
            except StopIteration as stop:
                both = stop.value
                break
    assert both[0].kld_mean < both[1].kld_mean and both[0].perplexity_base == both[1].perplexity_base
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_evaluation_and_calibration_share_no_conversation():
    one, two = (set(map(json.dumps, read_conversations(path))) for path in (EVALUATION, CALIBRATION))
    assert len(one) > 100 and len(two) > 100 and not one & two


def test_a_users_own_text_is_used_and_named(source, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"Paragraph {i} about nothing in particular, but long enough." for i in range(200)))
    result = convert(source, tmp_path / "out.gguf", quant=("Q8_0",), threads=1, text=text)[0]
    assert read_manifest(result.path)["verification"]["text"] == "mine.txt"
    text.write_text("short")
    with pytest.raises(ConvertError, match="tokens"):
        convert(source, tmp_path / "b.gguf", quant=("Q8_0",), threads=1, text=text)


def test_a_broken_template_is_a_sentence():
    with pytest.raises(ConvertError, match="template is broken"):
        Template("{% if %}")
    with pytest.raises(ConvertError, match="no tools"):
        Template("{{ raise_exception('no tools') }}").render([{"role": "user", "content": "x"}])

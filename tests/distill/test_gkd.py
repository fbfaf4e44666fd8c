"""GKD's loss is what the paper says, whatever the data's answers, the micro-batches or the number of processes.

Run: pytest tests/distill/test_gkd.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill import models
from distill.windows import is_on_policy
from tests.distill.tiny_models import conversation, write_rows


def first_step(trainer) -> tuple[float, float]:
    line, _ = trainer.step()
    return line["loss"], line["grad_norm"]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.train() if line["kind"] == "step"]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_on_policy_loss_does_not_depend_on_the_answers_in_the_data(trainer, tmp_path, beta):
    seen = []
    for length in (2, 40, 90):
        data = write_rows(tmp_path / f"{length}.jsonl", [conversation(f"say {n}", "b" * length) for n in range(24)])
        made = trainer(mode="on-policy", beta=beta, data=str(data))
        made.lengths = [row.prompt for row in made.data.training]
        seen.append(first_step(made))
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
    assert seen[0] == pytest.approx(seen[2], rel=1e-6)


@pytest.mark.parametrize("mode", ["on-policy", "kd", "sft", "seqkd"])
@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_loss_and_gradient_do_not_depend_on_micro_batches(trainer, mode, norm):
    whole = first_step(trainer(mode=mode, loss_norm=norm, micro_tokens=4096))
    alone = first_step(trainer(mode=mode, loss_norm=norm, micro_tokens=1))
    assert whole == pytest.approx(alone, rel=2e-5)


def test_the_kd_loss_equals_trl_on_the_same_rows(trainer):
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    from trl.experimental.gkd import GKDTrainer

    made = trainer(mode="kd", beta=0.3, window=24)
    loss, _ = first_step(made)
    made = trainer(mode="kd", beta=0.3, window=24)
    rows = made.data.training
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids.tolist() + [0] * (longest - len(row.ids)) for row in rows])
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        labels[index, : len(row.ids)][torch.from_numpy(row.trained)] = 0
    with torch.no_grad():
        student, teacher = made.model(ids).logits, made.teacher.model(ids).logits
    width = made.vocabulary
    expected = GKDTrainer.generalized_jsd_loss(
        student[:, :-1, :width], teacher[:, :-1, :width], labels=labels[:, 1:], beta=0.3
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_coin_follows_lmbda_and_is_a_function_of_the_window():
    coins = [is_on_policy(3, window, 0.25) for window in range(4000)]
    assert 0.22 < sum(coins) / 4000 < 0.28
    assert coins == [is_on_policy(3, window, 0.25) for window in range(4000)]
    assert all(is_on_policy(3, window, 1.0) for window in range(1000))
    assert not any(is_on_policy(3, window, 0.0) for window in range(1000))


def test_lmbda_may_move_over_the_run(trainer):
    made = trainer(mode="gkd", lmbda=0.0, lmbda_end=1.0, steps=5)
    assert [made.share(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_window_is_generated_once_whatever_the_micro_batches(trainer):
    made = trainer(mode="on-policy", micro_tokens=1)
    line, _ = made.step()
    assert line["passes"] <= 12


def test_phase_swap_changes_nothing(trainer):
    assert losses(trainer(mode="gkd", phase_swap=True)) == losses(trainer(mode="gkd"))


def test_seqkd_learns_the_teachers_words(trainer):
    made = trainer(mode="seqkd", steps=1)
    made.step()
    row = made.data.training[0]
    made.answers.given([row])
    text = made.answers.texts[row.key]
    assert text == made.teacher.answer([row.ids[: row.prompt].tolist()], [row.key], made.answers.sampling(0, "teacher"))[0]
    assert len(text) > 1


def test_training_brings_the_student_to_the_teacher(trainer):
    for mode in ("kd", "on-policy"):
        found = losses(trainer(mode=mode, beta=0.0, steps=40, lr=3e-3))
        assert found[-1] < 0.6 * found[0]


def test_the_base_without_adapter_is_the_teacher(trainer):
    made = trainer(mode="on-policy", teacher="adapter-off", lora_rank=4, beta=0.0)
    loss, _ = first_step(made)
    assert abs(loss) < 1e-6  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, parameter in made.learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    loss, norm = first_step(made)
    assert loss > 1e-3
    assert norm > 0


def test_a_merged_export_answers_like_the_model_with_its_adapter(trainer, tmp_path):
    made = trainer(mode="on-policy", teacher="adapter-off", lora_rank=4)
    with torch.no_grad():
        for name, parameter in made.learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    made.export(tmp_path / "out")
    ids = torch.tensor([[5, 9, 30, 31]])
    loaded = models.load_model(str(tmp_path / "out"), "student", torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, made.model.eval()(ids).logits, atol=1e-4)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(made.recipe.student) / name).read_bytes()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(count: int, arguments: list[str], **more: str) -> None:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "distill", *arguments],
            env=os.environ
            | {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | more,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    assert [process.wait(timeout=240) for process in started] == [0] * count


ASKED = {  # what `accelerate launch` puts into the environment
    "two": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
    "zero": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.mark.parametrize("kind", ["two", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp", "zero"))])
def test_two_processes_whole_or_sharded_give_the_losses_of_one(tmp_path, student, teacher, rows, kind):
    """gloo on a CPU: gradients summed over replicas; FSDP2, and DeepSpeed's ZeRO-3, with student and teacher in shards."""
    if kind == "zero":
        pytest.importorskip("deepspeed")
    from safetensors.torch import load_file

    from distill.__main__ import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"mode: gkd\nstudent: {student.as_posix()}\nteacher: {teacher.as_posix()}\ndata: {rows.as_posix()}\n"
        "window: 5\nsteps: 4\nholdout: 0.2\neval_every: 0\nnew_tokens: 10\nthreads: 1\nlr: 1e-3\nmicro_tokens: 64\n"
        "warm_start: 'off'\ndevice: cpu\ncheckpoint_every: 2\n",
        encoding="utf-8",
    )
    found, final = {}, {}
    for name in ("one", kind):
        run = tmp_path / name
        arguments = ["train", str(recipe), f"run={run.as_posix()}"]
        if name == "one":
            assert main(arguments) == 0
        else:
            in_processes(2, arguments, **ASKED[kind])
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found[name] = [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]
        found[name] += [(line["kl_student_teacher"],) for line in lines if line["kind"] == "eval"]
        final[name] = load_file(run / "final" / "model.safetensors")
    assert len(found["one"]) == 6
    for one, other in zip(found["one"], found[kind], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert final[kind].keys() == final["one"].keys()
    assert all(torch.allclose(final[kind][name], final["one"][name], atol=1e-4) for name in final["one"])
    for file in ("weights", "optimizer"):  # a checkpoint is whole tensors, whoever wrote it
        paths = [tmp_path / name / "checkpoints" / "step-00000004" / f"{file}.safetensors" for name in ("one", kind)]
        one, other = ({name: value.shape for name, value in load_file(path).items()} for path in paths)
        assert one == other


def test_a_run_that_gets_no_better_stops_and_keeps_its_best(trainer):
    """At a learning rate of 0 no evaluation is better than the first one."""
    settings = {"mode": "kd", "holdout": 0.3, "eval_every": 2, "steps": 40, "best_by": "heldout_loss"}
    made = trainer(lr=0.0, patience=3, **settings)
    said = [line["note"] for line in made.train() if line["kind"] == "note"]
    assert (made.done, said) == (6, ["patience: 3 evaluations no better than step 0's"])
    assert (made.run.folder / "final" / "config.json").exists()
    made.restore(6)
    assert [line for line in made.train() if line["kind"] == "step"] == []
    learning = trainer(lr=3e-3, patience=3, **(settings | {"steps": 8}))
    assert len(losses(learning)) == 8
    assert (learning.run.folder / "best" / "config.json").exists()

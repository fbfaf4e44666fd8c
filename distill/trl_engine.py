"""TRL's own trainers, untouched, on our recipes: baselines for parity and for speed.

engine: trl-gkd (GKDTrainer as it comes), trl-gkd-tuned (KV cache on, checkpointing off), trl-distillation. Their defects
(README) are theirs: this module only translates settings, logs, and writes the run folder.
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from distill import models
from distill.errors import DistillError
from distill.recipe import Recipe
from distill.rows import Report, read_rows
from distill.run import Run, write_whole

ROWS = 4  # per forward, where the window allows


def quiet() -> None:
    """No usage pings, no progress bars, before anything of TRL is imported."""
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "DISABLE_MLFLOW_INTEGRATION": "TRUE"}


def make_trainer(recipe: Recipe, folder: Path, callbacks=(), per_forward: int = ROWS):
    """A transformers Trainer of the kind `recipe.engine` names. Raises DistillError for what TRL cannot do."""
    quiet()
    try:
        import trl  # noqa: F401
        from datasets import Dataset
    except ModuleNotFoundError as exc:
        raise DistillError(
            "engine trl-* needs the packages trl and datasets (`pip install 'trl>=1.16,<2' datasets`)."
        ) from exc
    if recipe.teacher == "adapter-off" or recipe.lora_rank:
        raise DistillError(
            f"engine {recipe.engine} knows no adapter-off teacher and is offered without LoRA; use engine: own."
        )
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]
    student = models.load_model(recipe.student, "student", dtype)
    teacher = models.load_model(recipe.teacher, "teacher", dtype)
    tokenizer = models.load_tokenizer(recipe.student)
    messages = [[dict(message) for message in row.messages] for row in read_rows(recipe.data, Report()) if row.messages]
    per_forward = math.gcd(recipe.window, per_forward)
    shared = {
        "output_dir": str(folder),
        "use_cpu": not torch.cuda.is_available() or recipe.device == "cpu",
        "bf16": recipe.autocast,
        "per_device_train_batch_size": per_forward,
        "gradient_accumulation_steps": recipe.window // per_forward,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "max_steps": recipe.steps or -1,
        "num_train_epochs": recipe.epochs,
        "seed": recipe.seed,
        "temperature": recipe.temperature,
        "beta": recipe.beta,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if recipe.engine == "trl-distillation":
        from trl import DistillationConfig, DistillationTrainer

        args = DistillationConfig(**shared, max_completion_length=recipe.new_tokens, top_p=recipe.top_p)
        rows = Dataset.from_list([{"prompt": one[:-1]} for one in messages])
        kind = DistillationTrainer
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        tuned = {"gradient_checkpointing": False} if recipe.engine == "trl-gkd-tuned" else {}
        args = GKDConfig(
            **shared,
            **tuned,
            lmbda=recipe.on_policy_share[0],
            max_new_tokens=recipe.new_tokens,
            max_length=recipe.max_tokens,
            seq_kd=recipe.mode == "seqkd",
        )
        rows = Dataset.from_list([{"messages": one} for one in messages])
        kind = GKDTrainer
    from transformers import PrinterCallback

    made = kind(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)  # it prints to stdout, where our JSON goes
    return made


def stopwatch():
    """A callback that keeps the seconds of every optimizer step in `.seconds`."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.begin = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.perf_counter() - self.begin)

    return Stopwatch()


def train(run: Run) -> Iterator[dict]:
    """Trains by TRL, then writes the log (TRL's own numbers) and `final/`."""
    import torch

    recipe = run.recipe
    watch = stopwatch()
    trainer = make_trainer(recipe, run.folder / "trl", [watch])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, seconds in zip(entries, watch.seconds, strict=False):
        line = {
            "kind": "step",
            "step": entry["step"],
            "loss": entry["loss"],
            "lr": entry.get("learning_rate", 0.0),
            "grad_norm": entry.get("grad_norm", 0.0),
            "seconds": round(seconds, 4),
            "tokens_per_s": 0.0,
            "left_s": 0.0,
        }
        run.log(line)
        yield line
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.save_dtype or recipe.dtype]
    model = trainer.accelerator.unwrap_model(trainer.model)
    write_whole(run.folder / "final", lambda part: models.save_student(model, recipe, part, dtype))

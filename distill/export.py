"""A run's student as a folder for others: merged weights, ready for convert, or the LoRA adapter alone."""

import shutil
from pathlib import Path

from distill.errors import DistillError
from distill.run import Run, write_whole

ADAPTER_FOLDER = "adapter"


def export(run: Run, target: Path, source: str = "final", what: str = "merged") -> Path:
    """source: final, best, or a checkpoint's step. Raises DistillError when there is no such thing or `target` exists."""
    if target.exists():
        raise DistillError(f"{target} exists already; choose another folder.")
    if source.isdecimal():
        from_checkpoint(run, target, int(source))
        found = target
    else:
        found = run.folder / source
        if not (found / "config.json").exists():
            steps = ", ".join(map(str, run.steps())) or "none"
            raise DistillError(f"{run.folder} has no {source} student (checkpoints: {steps}); train on, or name a step.")
    if what == "adapter":
        found = found / ADAPTER_FOLDER
        if not found.exists():
            raise DistillError(f"{run.folder} was trained without LoRA; there is no adapter to export.")
    if found != target:
        write_whole(target, lambda part: shutil.copytree(found, part, dirs_exist_ok=True))
    return target


def from_checkpoint(run: Run, target: Path, step: int) -> None:
    from distill.machine import start_machine
    from distill.trainer import Trainer

    if step not in run.steps():
        raise DistillError(f"{run.folder} has no whole checkpoint of step {step}; it has {run.steps()}.")
    trainer = Trainer(run, start_machine(run.recipe))
    trainer.load_weights(step)
    trainer.export(target)

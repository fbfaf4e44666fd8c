"""On-policy distillation (GKD) on your own machine.

    python -m distill train RECIPE.yaml [key=value ...]     train; every key of the recipe can be overridden
    python -m distill resume runs/NAME                      go on after a stop or a kill, from the last whole checkpoint

A minimal recipe for supervised training (all keys: distill/recipe.py):

    mode: sft
    student: FOLDER                # config.json, model.safetensors, tokenizer.json, chat_template.jinja
    data: [a.jsonl, b.jsonl]       # rows {"messages": [...]} (loss on answers only), or {"text": "..."} (loss everywhere)
    run: runs/guide                # log.jsonl, checkpoints/, and at the end final/: a Hugging Face folder
    max_tokens: 512
    window: 64                     # rows per optimizer step
    micro_tokens: 1024             # padded tokens per forward and backward; the fastest on a CPU
    lr: 1e-3
    autocast: true                 # bf16 arithmetic over float32 weights
    epochs: 2                      # or steps: 1000
    eval_every: 100
    checkpoint_every: 200

Thoughts go into `reasoning_content`, or into the content as `<think>...</think>`; `run/final` of one stage can be the next
stage's `student`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import DistillError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m distill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train by a recipe")
    train.add_argument("recipe", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    resume = commands.add_parser("resume", help="go on with a run from its last whole checkpoint")
    resume.add_argument("run", type=Path)
    return top


def follow(lines) -> None:
    """Prints log lines for people; the run folder has them as JSON."""
    for line in lines:
        if line["kind"] == "step":
            print(
                f"step {line['step']:>6}  loss {line['loss']:.4f}  norm {line['grad_norm']:.3f}  lr {line['lr']:.2e}  "
                f"{line['tokens_per_s']:.0f} tokens/s  {clock(line['left_s'])} left",
                flush=True,
            )
        elif line["kind"] == "eval":
            numbers = (f"{name} {value:.4f}" for name, value in line.items() if isinstance(value, float) and name != "seconds")
            print(f"step {line['step']:>6}  held-out: {'  '.join(numbers)}", flush=True)
        else:
            print(line["note"], flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def train(recipe: Path, overrides: Sequence[str] = ()) -> None:
    from distill.recipe import Recipe

    settings = Recipe.read(recipe, overrides)
    from distill.machine import start_machine
    from distill.run import Run
    from distill.trainer import Trainer

    machine = start_machine(settings)
    run = Run.create(settings) if machine.is_main else Run(Path(settings.run))
    machine.wait()
    trainer = Trainer(run, machine)
    if machine.is_main:
        print(trainer.data.report.sentence(), flush=True)
    finish(trainer)


def resume(run: Path) -> None:
    from distill.machine import start_machine
    from distill.run import Run
    from distill.trainer import Trainer

    found = Run.open(run)
    machine = start_machine(found.recipe)
    trainer = Trainer(found, machine)
    if steps := found.steps():
        trainer.restore(steps[-1])
    else:
        found.forget_after(-1)
    finish(trainer)


def finish(trainer) -> None:
    for_people = trainer.train()
    if trainer.machine.is_main:
        follow(for_people)
    else:
        for _ in for_people:
            pass


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = vars(parser().parse_args(argv))
    command = {"train": train, "resume": resume}[options.pop("command")]
    try:
        command(**options)
    except DistillError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; `resume` goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

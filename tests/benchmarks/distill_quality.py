"""Final quality beside TRL's tuned GKD with its denominator mended: same student, teacher, prompts, settings and seeds.

Run: python tests/benchmarks/distill_quality.py FOLDER [--seeds 3] [--steps 200]   (minutes; a folder that `python -m distill
mini` made is used as it is, another is filled first). Both sides train on-policy, forward KL, on the grid; what is compared is
the share of fresh tasks solved. TRL's window is one batch, so that its denominator is right once it counts the sampled tokens.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill.grid import Lab, Scale, make_start, make_teacher


def settings(folder: Path, scale: Scale, seed: int) -> dict:
    return {
        "mode": "on-policy",
        "beta": 0.0,
        "student": str(folder / f"start-{seed}" / "final"),
        "teacher": str(folder / "teacher" / "final"),
        "data": str(folder / f"clean-{seed}.jsonl"),
        "steps": scale.steps,
        "lr": 1e-3,
        "warmup": 0.1,
        "seed": seed,
    }


def ours(lab: Lab, seed: int) -> Path:
    return lab.train(f"quality-own-{seed}", **settings(lab.folder, lab.scale, seed))


def theirs(lab: Lab, seed: int) -> Path:
    """TRL's GKDTrainer, cache on and checkpointing off, its loss divided by the tokens it is computed on."""
    import torch

    from distill import models
    from distill.recipe import Recipe
    from distill.trl_engine import make_trainer

    recipe = Recipe.of(
        settings(lab.folder, lab.scale, seed)
        | {"engine": "trl-gkd-tuned", "window": lab.scale.window, "max_tokens": 64, "new_tokens": 26, "device": "cpu"}
    )
    torch.set_num_threads(1)
    trainer = make_trainer(recipe, lab.folder / f"trl-{seed}", per_forward=recipe.window)
    as_it_comes = trainer.compute_loss

    def mended(model, inputs, return_outputs=False, num_items_in_batch=None):
        return as_it_comes(model, inputs, return_outputs, (inputs["labels"][:, 1:] != -100).sum())

    trainer.compute_loss = mended
    trainer.train()
    target = lab.folder / f"quality-trl-{seed}"
    models.save_student(trainer.accelerator.unwrap_model(trainer.model), recipe, target, torch.float32)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Scale.steps)
    parser.add_argument("--tests", type=int, default=1000, help="tasks to solve (default: 1000, s.e. about 1.5 points)")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    scale = Scale(steps=given.steps)
    given.folder.mkdir(parents=True, exist_ok=True)
    if not (given.folder / "teacher" / "final").exists():
        print(json.dumps(make_teacher(given.folder, scale)), flush=True)
    lab = Lab(given.folder, scale)
    fresh = lab.folder / "fresh.jsonl"
    from distill.grid import write_tasks

    write_tasks(fresh, given.tests, 0.0, 30_000, repeat=True)
    gaps: dict[str, list[float]] = {"greedy": [], "sampled": []}
    for seed in range(given.seeds):
        if not (given.folder / f"start-{seed}" / "final").exists():
            print(json.dumps(make_start(given.folder, scale, seed)), flush=True)
        found = {}
        for name, train in (("own", ours), ("trl", theirs)):
            begin = time.process_time()
            made = train(lab, seed)
            found[name] = lab.score(made, fresh)
            line = {"engine": name, "seed": seed, **found[name], "cpu_seconds": round(time.process_time() - begin, 1)}
            print(json.dumps(line), flush=True)
        for kind, values in gaps.items():
            values.append(found["own"][kind] - found["trl"][kind])
    for kind, values in gaps.items():
        print(f"{kind}: ours - TRL = {np.mean(values):+.1f} points (by seed: {', '.join(f'{v:+.1f}' for v in values)})")


if __name__ == "__main__":
    main()

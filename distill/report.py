"""A run as one HTML page that opens anywhere, offline, and its pictures as PNG files.

Run: python -m distill plot runs/NAME
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from distill.chart import Chart, Line
from distill.errors import DistillError
from distill.run import Run

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1340px; margin: 2rem auto; padding: 0 1rem }
body { color: #111; background: #fff }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem }
svg { width: 100%; height: auto; border: 1px solid #e5e7eb; border-radius: 6px } svg text { font-size: 11px; fill: #444 }
svg .title { font-size: 13px; font-weight: 600; fill: #111 } svg .unit { font-weight: 400; fill: #666 }
.grid { stroke: #e5e7eb }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #e5e7eb; padding: .3rem .6rem; text-align: left;
vertical-align: top } td.text { white-space: pre-wrap; max-width: 26rem; overflow-wrap: anywhere } details { margin: 1rem 0 }
"""


def charts(lines: Sequence[dict]) -> dict[str, Chart]:
    """Every picture there is data for, by file name."""
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]

    def series(name: str, label: str, chosen: Sequence[dict] = steps, **options) -> Line:
        return Line(label, [(line["step"], line[name]) for line in chosen if line.get(name) is not None], **options)

    def measured(name: str, label: str) -> Line:
        kept = [line for line in evals if line.get(name) is not None]
        spread = [line.get(f"{name}_ci") or 0.0 for line in kept]
        return Line(label, [(line["step"], line[name]) for line in kept], spread)

    own = [line for line in steps if line.get("on_policy")]
    fixed = [line for line in steps if not line.get("on_policy")]
    phases = sorted({name for line in steps for name in line.get("phases", {})}, key=lambda name: (name == "other", name))
    made = {
        "loss": Chart(
            "Loss", "per token, by whose answers", [series("loss", "student's", own), series("loss", "data's", fixed)]
        ),
        "divergence": Chart(
            "KL on the student's own answers",
            "nats per token, 95 %",
            [measured("kl_teacher_student", "KL(teacher, student)"), measured("kl_student_teacher", "KL(student, teacher)")],
        ),
        "data-divergence": Chart(
            "KL on the data's answers",
            "nats per token, 95 %",
            [
                measured("data_kl_teacher_student", "KL(teacher, student)"),
                measured("data_kl_student_teacher", "KL(student, teacher)"),
            ],
        ),
        "heldout": Chart(
            "Held-out loss", "nats per token, 95 %", [measured("heldout_loss", "held out"), measured("keep_loss", "to keep")]
        ),
        "score": Chart(
            "Task score",
            "share, 95 %",
            [measured("score", "sampled"), measured("greedy_score", "greedy"), measured("keep_greedy_score", "to keep")],
        ),
        "agreement": Chart(
            "Agreement with the teacher",
            "share",
            [measured("top1", "same first choice"), measured("top16_overlap", "top-16 overlap")],
        ),
        "entropy": Chart("Entropy of the student", "nats per token", [measured("entropy", "own answers")]),
        "length": Chart("Length of the student's answers", "tokens", [series("length", "mean", own)]),
        "ends": Chart(
            "How answers end",
            "share",
            [series("end_rate", "ended by itself", own), series("repeated", "repeated 4-grams", own)],
        ),
        "gradient": Chart("Gradient norm", "", [series("grad_norm", "before clipping")]),
        "rate": Chart("Learning rate", "", [series("lr", "lr")]),
        "time": Chart(
            "Time per step",
            "seconds, by phase",
            [
                Line(name, [(line["step"], line["phases"].get(name, 0.0)) for line in steps if "phases" in line])
                for name in phases
            ],
            stacked=True,
        ),
        "memory": Chart("Peak memory", "MB", [series("peak_mb", "process or GPU")]),
    }
    found = {}
    for name, chart in made.items():
        kept = [line for line in chart.lines if line.points]
        if kept:
            found[name] = Chart(chart.title, chart.unit, kept, chart.stacked)
    return found


def table(rows: Sequence[Sequence[str]], head: Sequence[str], text: bool = False) -> str:
    kind = ' class="text"' if text else ""
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


def before_and_after(lines: Sequence[dict]) -> str:
    """First and last evaluation, and the teacher where it was measured."""
    evals = [line for line in lines if line["kind"] == "eval"]
    if not evals:
        return ""
    names = [
        name
        for name, value in evals[-1].items()
        if isinstance(value, float) and not name.endswith("_ci") and name != "seconds"
    ]

    def cell(line: dict, name: str) -> str:
        value, spread = line.get(name), line.get(f"{name}_ci")
        return "" if value is None else f"{value:.4f}" + (f" ± {spread:.4f}" if spread else "")

    rows = [(name, cell(evals[0], name), cell(evals[-1], name)) for name in names]
    return "<h2>Before and after</h2>" + table(rows, ("measure", f"step {evals[0]['step']}", f"step {evals[-1]['step']}"))


def samples(lines: Sequence[dict]) -> str:
    found = [line for line in lines if line["kind"] == "samples"]
    if not found:
        return ""
    first, last = found[0]["samples"], found[-1]["samples"]
    rows = [(a["prompt"], a["student"], b["student"], a.get("teacher", "")) for a, b in zip(first, last, strict=True)]
    return "<h2>Answers</h2>" + table(rows, ("prompt", "before", "after", "teacher"), text=True)


def write_report(run: Run) -> tuple[Path, list[Path]]:
    """`report.html` and `pictures/*.png` in the run folder. Raises DistillError when nothing was logged."""
    lines = list(run.lines())
    made = charts(lines)
    if not made:
        raise DistillError(f"{run.folder} has no logged steps yet; train first.")
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    for name, chart in made.items():
        chart.png(folder / f"{name}.png")
    notes = "".join(f"<li>step {line['step']}: {escape(line['note'])}</li>" for line in lines if line["kind"] == "note")
    recipe = escape((run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(run.folder.name)}</title><style>{STYLE}</style>'
        f"<h1>{escape(run.folder.name)}</h1><main>{''.join(chart.svg() for chart in made.values())}</main>"
        f"{f'<h2>Notes</h2><ul>{notes}</ul>' if notes else ''}{before_and_after(lines)}{samples(lines)}"
        f"<details><summary>Recipe</summary><pre>{recipe}</pre></details></html>\n"
    )
    target = run.folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target, sorted(folder.glob("*.png"))

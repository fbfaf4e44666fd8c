"""A recipe: every setting of a run, written once, read from YAML and `key=value` overrides.

Use: `Recipe.read(Path("recipe.yaml"), ["lr=1e-5"])`. Unknown keys fail with the nearest match.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from distill.errors import DistillError

MODES = ("sft", "seqkd", "kd", "gkd", "on-policy")
DTYPES = ("float32", "bfloat16")
ADAPTER_OFF = "adapter-off"  # as `teacher`: the student's own base, with the LoRA adapter switched off


@dataclass(frozen=True)
class Recipe:
    """All settings with their defaults. Lengths are in tokens, times in seconds, a step is one optimizer step (a window)."""

    # what is trained on what
    mode: str = "gkd"  # sft | seqkd (cross-entropy on teacher text) | kd (lmbda 0) | gkd | on-policy (lmbda 1)
    student: str = ""  # a Hugging Face directory or hub id
    teacher: str = ""  # the same, or `adapter-off`
    accept: tuple[str, ...] = ()  # differences between the two that are known: chat template | special tokens | end tokens
    data: tuple[str, ...] = ()  # .jsonl .json .parquet .csv files, or hub ids like `org/name:split`
    run: str = "runs/distill"  # the run folder
    # data
    eval_data: tuple[str, ...] = ()  # held-out rows; empty: a share of `data`, split by prompt hash
    keep_data: tuple[str, ...] = ()  # a second set, measured and never trained on: what must not be forgotten
    holdout: float = 0.02
    max_rows: int = 0  # a seeded subset of so many rows; 0: all
    max_tokens: int = 1024  # longer rows are dropped and counted; `text` rows are cut into pieces of this length
    train_on: str = "all"  # all assistant turns | last
    thinking: str = "auto"  # auto: rows with thoughts are rendered as such | on | off
    text_end: str = "<|endoftext|>"  # what follows each `text` row (the EOS token when unknown)
    bad_rows: str = "skip"  # skip | fail
    # the method
    lmbda: float = 0.5  # share of windows on the student's own answers
    lmbda_end: float | None = None  # lmbda moves linearly to this over the run
    beta: float = 0.5  # 0: KL(teacher||student) | 1: KL(student||teacher) | between: generalised JSD
    normalize_beta: bool = False  # divide JSD by beta(1-beta): continuous in beta
    temperature: float = 1.0  # of sampling, and of the loss unless `loss_temperature` says otherwise
    loss_temperature: float | None = None
    top_p: float = 1.0
    new_tokens: int = 256
    loss_norm: str = "token"  # token | sequence
    phase_swap: bool = False  # only one of student and teacher on the device at a time
    teacher_bits: int = 16  # 4 or 8 on CUDA with bitsandbytes
    # optimisation
    steps: int = 0  # 0: `epochs` decide
    epochs: float = 1.0
    window: int = 32  # rows per optimizer step, over all processes
    micro_tokens: int = 1024  # padded tokens per forward and backward (2 CPU cores: 4.4k tokens/s at 1024, 3.2k at 2048)
    generate_tokens: int = 65536  # tokens (prompt and answer) of the KV cache while generating
    generator: str = "own"  # own | vllm (CUDA, one process; `pip install vllm`)
    vllm_memory: float = 0.3  # share of the GPU's memory that vLLM may take while it writes
    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.05  # share of the steps when below 1, else steps
    weight_decay: float = 0.0
    optimizer: str = "adamw"  # adamw | muon (of the layers' matrices, with AdamW for the rest): far faster from blank weights
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    clip: float = 1.0  # of the gradient norm; 0: off
    seed: int = 42
    # LoRA
    lora_rank: int = 0  # 0: all weights are trained
    lora_alpha: float = 0.0  # 0: twice the rank
    # the machine
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "float32"  # of the weights
    autocast: bool = False  # bf16 arithmetic over float32 weights
    checkpointing: bool = False  # of activations, in training only
    threads: int = 0  # 0: torch's own choice
    compile: bool = False  # torch.compile of the student's layers: needs a C++ compiler on a CPU
    # measuring and keeping
    eval_every: int = 100  # steps; 0: only before and after
    eval_rows: int = 64
    eval_samples: bool = True  # also sample: KL on own samples, agreement, lengths (needs a teacher)
    task: str = ""  # score of held-out answers: exact | regex:PATTERN | file.py:function
    best_by: str = "auto"  # auto: kl_student_teacher with a teacher, else heldout_loss | any name in an eval line
    patience: int = 0  # stop after so many evaluations without a better one by `best_by`; 0: never
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    save_dtype: str = ""  # of the exported weights; empty: `dtype`
    warm_start: str = "warn"  # warn | fail | off: is the student able to start on its own answers?
    watch: str = "warn"  # warn | pause | off: answers that grow, are cut off, never end, or repeat themselves
    engine: str = "own"  # own | trl-gkd | trl-gkd-tuned | trl-distillation

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise DistillError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}.")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DistillError(f"{name} is {value}; expected {low} to {high}.")

    @property
    def needs_teacher(self) -> bool:
        return self.mode != "sft"

    @property
    def on_policy_share(self) -> tuple[float, float]:
        """lmbda at the first and at the last step."""
        fixed = {"sft": 0.0, "seqkd": 0.0, "kd": 0.0, "on-policy": 1.0}
        first = fixed.get(self.mode, self.lmbda)
        last = fixed.get(self.mode, self.lmbda if self.lmbda_end is None else self.lmbda_end)
        return first, last

    @property
    def temperature_of_loss(self) -> float:
        return self.temperature if self.loss_temperature is None else self.loss_temperature

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe of a YAML file, with `key=value` overrides. Raises DistillError."""
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError as exc:
            raise DistillError(f"There is no recipe {path}; `python -m distill init {path}` writes one.") from exc
        except (yaml.YAMLError, UnicodeDecodeError) as exc:
            raise DistillError(f"{path} is not YAML: {exc}") from exc
        if not isinstance(content, dict):
            raise DistillError(f"{path} holds no `key: value` lines.")
        return cls.of({**content, **parse_overrides(overrides)})

    @classmethod
    def of(cls, values: Mapping[str, object]) -> "Recipe":
        hints = get_type_hints(cls)
        for name in values:
            if name not in hints:
                near = get_close_matches(str(name), hints, n=1, cutoff=0.4)
                raise DistillError(f"Unknown key {name!r} in the recipe{f'; did you mean {near[0]!r}?' if near else '.'}")
        return cls(**{name: coerce(name, value, hints[name]) for name, value in values.items()})

    def but(self, **changes) -> "Recipe":
        return replace(self, **changes)

    def write(self, path: Path) -> None:
        import yaml

        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


CHOICES = {
    "mode": MODES,
    "dtype": DTYPES,
    "save_dtype": ("", *DTYPES),
    "train_on": ("all", "last"),
    "thinking": ("auto", "on", "off"),
    "bad_rows": ("skip", "fail"),
    "loss_norm": ("token", "sequence"),
    "schedule": ("cosine", "linear", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "optimizer": ("adamw", "muon"),
    "teacher_bits": (4, 8, 16),
    "warm_start": ("warn", "fail", "off"),
    "watch": ("warn", "pause", "off"),
    "generator": ("own", "vllm"),
    "engine": ("own", "trl-gkd", "trl-gkd-tuned", "trl-distillation"),
}
RANGES = {
    "holdout": (0, 0.5),
    "max_tokens": (2, 2**20),
    "lmbda": (0, 1),
    "lmbda_end": (0, 1),
    "beta": (0, 1),
    "temperature": (0.01, 100),
    "loss_temperature": (0.01, 100),
    "top_p": (0.01, 1),
    "new_tokens": (1, 2**20),
    "epochs": (0, 1e6),
    "steps": (0, 10**9),
    "window": (1, 10**6),
    "micro_tokens": (1, 10**9),
    "lr": (0, 10),
    "warmup": (0, 10**9),
    "clip": (0, 1e9),
    "keep_checkpoints": (1, 1000),
    "checkpoint_every": (1, 10**9),
    "patience": (0, 10**6),
    "vllm_memory": (0.01, 1),
}


def parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    import yaml

    values = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise DistillError(f"{text!r} is not `key=value`.")
        values[name.strip()] = yaml.safe_load(value) if value else ""
    return values


def coerce(name: str, value: object, kind: object) -> object:
    """`value` as `kind`: YAML reads 1e-7 as text and `data: a.jsonl` as one text."""
    if isinstance(kind, types.UnionType):
        return None if value is None or value == "" else coerce(name, value, get_args(kind)[0])
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else str(value).split(",") if value else []
        return tuple(str(item).strip() for item in items)
    if kind is str:
        if isinstance(value, bool):  # YAML reads `thinking: on` as true
            return "on" if value else "off"
        return "" if value is None else str(value)
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (TypeError, ValueError, OverflowError) as exc:
        raise DistillError(f"{name} is {value!r}; expected {'true or false' if kind is bool else kind.__name__}.") from exc


def commented() -> str:
    """Every key with its default and comment: the fields of Recipe, as YAML."""
    import inspect

    import yaml

    lines, defaults = ["# Every key and its default. Remove what you do not change."], Recipe()
    body = inspect.getsource(Recipe).split("def __post_init__")[0]
    for line in body.splitlines():
        text = line.strip()
        name, colon, rest = text.partition(": ")
        if text.startswith("# "):
            lines += ["", f"# {text[2:]}"]
        elif colon and name in Recipe.__dataclass_fields__:
            value = getattr(defaults, name)
            shown = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
            comment = rest.partition("  # ")[2]
            lines.append(f"{name}: {shown.splitlines()[0]}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def bundled(name: str) -> str:
    """The text of a recipe that comes with the project. Raises DistillError."""
    folder = Path(__file__).with_name("recipes")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise DistillError(f"There is no bundled recipe {name!r}; there are {', '.join(names)}.")
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")

"""The training loop: window after window, a checkpoint now and then, every phase timed.

`Trainer(run, machine).train()` yields a dict per log line; closing the generator stops after the current step.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distill import models, windows
from distill.batch import Batch, batches, targets_of, weights_of
from distill.errors import DistillError
from distill.loss import CrossEntropy, NotFinite
from distill.machine import Machine, peak_memory
from distill.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from distill.recipe import Recipe
from distill.rows import Report, read_rows
from distill.run import Run, write_json, write_whole
from distill.tokens import TokenRow, end_tokens, read_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Clock:
    """Seconds per phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return {name: round(value, 4) for name, value in taken.items()}


class Signals:
    """SIGTERM and Ctrl-C ask for a checkpoint at the end of the step; a second one stops at once."""

    def __init__(self):
        self.asked = ""

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


def read_data(recipe: Recipe, tokenizer, ends, cache: Path) -> tuple[list[TokenRow], list[TokenRow], Report]:
    """(rows to train on, held-out rows, report). Raises DistillError when nothing is left, or for a bad row if so asked."""
    if not recipe.data:
        raise DistillError("The recipe names no data; add `data: FILE.jsonl`.")
    report = Report()
    rows = read_rows(recipe.data, report)
    other = read_rows(recipe.eval_data, Report()) if recipe.eval_data else []
    if other:
        held = {row.prompt_key for row in other}
        kept = [row for row in rows if row.prompt_key not in held]
        for row in rows:
            if row.prompt_key in held:
                report.refuse(row.place, "its prompt is among the held-out rows")
        rows = kept
    if recipe.max_rows and len(rows) > recipe.max_rows:
        order = np.random.default_rng(windows.digest(recipe.seed, "subset")).permutation(len(rows))
        rows = [rows[index] for index in sorted(order[: recipe.max_rows])]
    tokens = read_tokens(rows, tokenizer, ends, recipe, report, cache)
    held_out = tokens.held_out.astype(bool)
    training, testing = tokens.where(~held_out), tokens.where(held_out)
    if other:
        testing = list(
            map(read_tokens(other, tokenizer, ends, recipe.but(eval_data=()), Report(), cache).__getitem__, range(len(other)))
        )
    if report.reasons and recipe.bad_rows == "fail":
        raise DistillError(f"bad_rows is fail: {report.sentence()}")
    if not training:
        raise DistillError(f"No row is left to train on. {report.sentence()}")
    return training, testing, report


class Trainer:
    """A run with its models, data and optimizer in memory."""

    def __init__(self, run: Run, machine: Machine):
        self.run, self.machine, self.recipe = run, machine, run.recipe
        recipe = self.recipe
        self.tokenizer = models.load_tokenizer(recipe.student)
        self.model = models.load_model(recipe.student, "student", DTYPES[recipe.dtype])
        self.ends = end_tokens(self.tokenizer, self.model.generation_config.eos_token_id)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        self.rows, self.held_out, self.report = read_data(recipe, self.tokenizer, self.ends, run.cache)
        self.model.to(machine.device)
        if recipe.lora_rank:
            models.add_lora(self.model, recipe)
        if recipe.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.student = models.Student(self.model)
        self.parameters = models.trainable(self.model)
        self.optimizer = make_optimizer(self.parameters, recipe)
        if recipe.compile:
            models.backbone(self.model).compile(dynamic=True)
        self.windows = windows.Windows(len(self.rows), recipe.window, recipe.seed)
        self.steps = recipe.steps or math.ceil(recipe.epochs * self.windows.per_epoch)
        self.lengths = [len(row.ids) for row in self.rows]
        self.clock = Clock()
        self.done = 0
        self.tokens = 0
        self.best: dict = {}

    # ---------------------------------------------------------------- the loop

    def train(self) -> Iterator[dict]:
        """Steps until the end, a signal, or an error. Yields the log lines, which are also written to the run folder."""
        recipe = self.recipe
        if self.machine.is_main:
            write_json(self.run.folder / "data.json", self.report.as_dict() | lengths_of(self.rows, self.held_out))
        begin, first = time.perf_counter(), self.done
        if self.done == 0:
            yield from self.evaluate()
        with Signals().caught() as signals:
            while self.done < self.steps:
                line = self.step()
                spent = time.perf_counter() - begin
                line["left_s"] = round(spent / (self.done - first) * (self.steps - self.done), 1)
                yield self.log(line)
                last = self.done == self.steps
                if last or (recipe.eval_every and self.done % recipe.eval_every == 0):
                    yield from self.evaluate()
                stop = self.stopping(signals)
                if last or stop or self.done % recipe.checkpoint_every == 0:
                    self.checkpoint()
                if stop and not last:
                    yield self.log({"kind": "note", "step": self.done, "note": f"{stop}: stopped after a checkpoint"})
                    return
        self.export(self.run.folder / "final")

    def stopping(self, signals: Signals) -> str:
        return next((asked for asked in self.machine.gather(signals.asked) if asked), "")

    def step(self) -> dict:
        """One window: examples, gradients, optimizer. Weights change only when everything is finite."""
        recipe, clock, step = self.recipe, self.clock, self.done
        begin = time.perf_counter()
        torch.manual_seed(windows.digest(recipe.seed, "torch", step) % 2**63)
        chosen = windows.share_of(self.windows.rows_of(step), self.machine.rank, self.machine.world, self.lengths)
        examples = [self.rows[row] for row in chosen]
        tokens, count = self.machine.sum(sum(map(targets_of, examples)), len(examples))
        weights = weights_of(examples, recipe.loss_norm, tokens, count)
        pieces = batches(examples, weights, recipe.micro_tokens, self.pad)
        self.student.train()
        loss = 0.0
        for batch in pieces:
            loss += self.learn(batch)
        (loss,) = self.machine.sum(loss)
        with clock.phase("optimizer"):
            norm = self.gradient_norm(pieces)
            rate = learning_rate(recipe, step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.tokens += int(tokens)
        seconds = time.perf_counter() - begin
        padded = sum(batch.ids.numel() for batch in pieces)
        phases = clock.take()
        return {
            "kind": "step",
            "step": self.done,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "targets": int(tokens),
            "tokens": self.tokens,
            "tokens_per_s": round(sum(len(row.ids) for row in examples) * self.machine.world / seconds, 1),
            "padding": round(1 - sum(len(row.ids) for row in examples) / max(1, padded), 4),
            "seconds": round(seconds, 4),
            "phases": phases | {"other": round(seconds - sum(phases.values()), 4)},
            "peak_mb": round(peak_memory(self.machine.device), 1),
        }

    def learn(self, batch: Batch) -> float:
        """Forward and backward of one batch; gives its part of the loss."""
        batch = batch.to(self.machine.device)
        try:
            with self.clock.phase("student"):
                with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=self.recipe.autocast):
                    loss, _ = self.student(batch.ids, batch.positions, batch.weights, CrossEntropy(batch.labels))
                loss.backward()
            return loss.item()
        except NotFinite as exc:
            raise self.refuse(exc, batch) from exc

    def refuse(self, exc: NotFinite, batch: Batch) -> DistillError:
        """Keeps the batch beside the log and says where; weights are as the last step left them."""
        from safetensors.torch import save_file

        folder = self.run.folder / f"bad-batch-{self.done + 1}"

        def fill(part: Path) -> None:
            save_file({"ids": batch.ids.cpu(), "positions": batch.positions.cpu()}, part / "batch.safetensors")
            texts = [self.tokenizer.decode(ids) for ids in batch.ids.tolist()]
            write_json(part / "texts.json", texts)

        write_whole(folder, fill)
        self.optimizer.zero_grad(set_to_none=True)
        return DistillError(
            f"Step {self.done + 1}: {exc.what} is NaN or infinite. The weights are untouched; the batch is in {folder}."
        )

    def gradient_norm(self, pieces: list[Batch]) -> float:
        """The norm over all processes, after summing the gradients; clips. Raises DistillError when it is not finite."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.machine.world > 1:
            sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip or math.inf)
        if not torch.isfinite(norm):
            raise self.refuse(NotFinite("The gradient", 0), pieces[0])
        return norm.item()

    # ---------------------------------------------------------------- measuring

    @torch.no_grad()
    def heldout_loss(self, rows: list[TokenRow]) -> float:
        """Mean cross-entropy per trained token of `rows`, in nats."""
        total = count = 0.0
        self.student.eval()
        for batch in batches(rows, [1.0] * len(rows), self.recipe.micro_tokens, self.pad):
            batch = batch.to(self.machine.device)
            with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=self.recipe.autocast):
                loss, _ = self.student(batch.ids, batch.positions, batch.weights, CrossEntropy(batch.labels))
            total, count = total + loss.item(), count + len(batch.positions)
        return total / max(1, count)

    def evaluate(self) -> Iterator[dict]:
        rows = [row for row in self.held_out if targets_of(row)][: self.recipe.eval_rows]
        if not rows:
            return
        begin = time.perf_counter()
        line = {"kind": "eval", "step": self.done, "heldout_loss": self.heldout_loss(rows), "rows": len(rows)}
        line["seconds"] = round(time.perf_counter() - begin, 3)
        yield self.log(line)

    def log(self, line: dict) -> dict:
        if self.machine.is_main:
            self.run.log(line)
        return line

    # ---------------------------------------------------------------- keeping

    def checkpoint(self) -> None:
        if self.machine.is_main:
            weights = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
            state = {"tokens": self.tokens, "best": self.best, "threads": torch.get_num_threads(), "dtype": self.recipe.dtype}
            optimizer = optimizer_state(self.optimizer, self.parameters)
            self.run.save_checkpoint(self.done, weights, optimizer, state, self.recipe.keep_checkpoints)
        self.machine.wait()

    def restore(self, step: int) -> None:
        """The state after `step` steps."""
        weights, optimizer, state = self.run.load_checkpoint(step)
        if set(weights) != set(self.parameters):
            raise DistillError(f"The checkpoint of step {step} belongs to another model than the recipe's student.")
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value)
        load_optimizer_state(self.optimizer, self.parameters, optimizer)
        self.done, self.tokens, self.best = step, state["tokens"], state["best"]
        if self.machine.is_main:
            self.run.forget_after(step)

    def export(self, target: Path) -> None:
        """The student as a Hugging Face folder."""
        if self.machine.is_main:
            dtype = DTYPES[self.recipe.save_dtype or self.recipe.dtype]
            write_whole(target, lambda part: models.save_model(self.model, self.recipe.student, part, dtype))
        self.machine.wait()


def sum_gradients(parameters: list[torch.nn.Parameter], bucket: int = 1 << 25) -> None:
    """All processes' gradients summed in place, in buckets of `bucket` numbers."""
    group: list[torch.Tensor] = []

    def flush() -> None:
        if group:
            flat = torch.cat([gradient.flatten() for gradient in group])
            dist.all_reduce(flat)
            for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
                gradient.copy_(part.view_as(gradient))
            group.clear()

    for parameter in parameters:
        if group and (sum(g.numel() for g in group) > bucket or group[0].dtype != parameter.grad.dtype):
            flush()
        group.append(parameter.grad)
    flush()


def lengths_of(rows: list[TokenRow], held_out: list[TokenRow]) -> dict:
    """A histogram of row lengths by powers of two, for the data report."""
    counts: dict[str, int] = {}
    for row in rows:
        upper = 1 << max(0, len(row.ids) - 1).bit_length()
        counts[str(upper)] = counts.get(str(upper), 0) + 1
    return {
        "rows": len(rows),
        "held_out": len(held_out),
        "tokens": sum(len(row.ids) for row in rows),
        "rows_up_to_length": dict(sorted(counts.items(), key=lambda item: int(item[0]))),
    }

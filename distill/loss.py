"""The loss in chunks, with its closed-form gradient: no logits of a whole batch ever exist.

`head_loss(hidden, head, weights, objective)` projects the hidden states of the positions that count, chunk by chunk, asks the
objective for value and gradient at the logits, and folds the gradient back at once. Memory is a few tiles [n, V], whatever N.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.batch import Batch

TILE_BYTES = 20 << 20  # of one [n, V] fp32 tile on a CPU: 32 rows at V = 151,936; a GPU takes 256 (0.16 GB)


class NotFinite(DistillError):
    """NaN or infinity in teacher, student or loss. `row`: the position among those given."""

    def __init__(self, what: str, row: int):
        super().__init__(f"{what} is NaN or infinite at position {row} of the batch; nothing was changed by this step.")
        self.what, self.row = what, row
        self.batch: Batch | None = None  # filled in by whoever knows it


class Tiles:
    """Named scratch tensors that every chunk uses again: fresh ones cost more in page faults than the arithmetic."""

    def __init__(self):
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, width], contents undefined."""
        tile, dtype = self.held.get(name), dtype or like.dtype
        if tile is None or tile.dtype != dtype or tile.numel() < rows * width:
            tile = self.held[name] = torch.empty(rows * width, dtype=dtype, device=like.device)
        return tile[: rows * width].view(rows, width)


class Objective(Protocol):
    """What is minimised, position by position."""

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool, tiles: Tiles) -> Tensor:
        """Values [n] for student logits [n, V] fp32; with_gradient: `logits` becomes the gradient at the logits."""


def log_softmax_(logits: Tensor) -> Tensor:
    """In place. One fused pass; torch.logsumexp and a subtraction take 4 to 20 times as long on a CPU."""
    return torch.ops.aten._log_softmax.out(logits, 1, False, out=logits)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label). labels [N] int64."""

    labels: Tensor

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool, tiles: Tiles) -> Tensor:
        labels = self.labels[rows, None]
        values = -log_softmax_(logits).gather(1, labels).squeeze(1)
        if with_gradient:
            logits.exp_().scatter_add_(1, labels, torch.full_like(labels, -1, dtype=logits.dtype))
        return values


@dataclass(frozen=True)
class Divergence:
    """Generalised Jensen-Shannon divergence of teacher q and student p over the whole vocabulary (GKD, arXiv 2306.13649).

    beta 0: KL(q||p); beta 1: KL(p||q); between: beta KL(q||m) + (1-beta) KL(p||m) with m = beta q + (1-beta) p.
    teacher [N, Ht] hidden states of the same positions; teacher_head [V, Ht]. `normalize` divides by beta(1-beta), which makes
    the value continuous in beta. The gradient is at the logits before the temperature; there is no T^2 factor (TRL has none).
    """

    teacher: Tensor
    teacher_head: Tensor
    beta: float
    temperature: float = 1.0
    normalize: bool = False
    vocabulary: int = 0  # logits beyond it (padded heads) never enter the softmax; 0: the smaller head

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool, tiles: Tiles) -> Tensor:
        hidden = self.teacher[rows].to(self.teacher_head.device)
        teacher = project(hidden, self.teacher_head, tiles, "teacher").to(logits.dtype)
        width = min(logits.shape[1], teacher.shape[1], self.vocabulary or logits.shape[1])
        student, outside, teacher = logits[:, :width], logits[:, width:], teacher[:, :width]
        if len(outside.T) or not teacher.is_contiguous():
            student, teacher = student.contiguous(), teacher.contiguous()
        if self.temperature != 1:
            student.div_(self.temperature)
            teacher.div_(self.temperature)
        log_softmax_(student)
        log_softmax_(teacher)
        rule = self.forward_kl if self.beta == 0 else self.reverse_kl if self.beta == 1 else self.jensen_shannon
        values = rule(student, teacher, with_gradient, tiles)
        scale = 1 / (self.beta * (1 - self.beta)) if self.normalize and 0 < self.beta < 1 else 1.0
        if with_gradient:
            if scale != self.temperature:
                student.mul_(scale / self.temperature)
            if student.data_ptr() != logits.data_ptr() or len(outside.T):
                logits[:, :width] = student
                outside.zero_()
        return values * scale if scale != 1 else values

    # The rules overwrite log p and log q [n, V]; with_gradient, log p becomes the gradient.

    @staticmethod
    def forward_kl(log_p: Tensor, log_q: Tensor, with_gradient: bool, tiles: Tiles) -> Tensor:
        """sum q (log q - log p); gradient p - q."""
        q = torch.exp(log_q, out=tiles.take("q", log_q, *log_q.shape))
        values = torch.linalg.vecdot(q, log_q.sub_(log_p))
        if with_gradient:
            log_p.exp_().sub_(q)
        return values

    @staticmethod
    def reverse_kl(log_p: Tensor, log_q: Tensor, with_gradient: bool, tiles: Tiles) -> Tensor:
        """k = sum p (log p - log q); gradient p (log p - log q - k)."""
        gap = torch.sub(log_p, log_q, out=log_q)
        p = log_p.exp_()
        k = torch.linalg.vecdot(p, gap)
        if with_gradient:
            p.mul_(gap.sub_(k[:, None]))
        return k

    def jensen_shannon(self, log_p: Tensor, log_q: Tensor, with_gradient: bool, tiles: Tiles) -> Tensor:
        """beta sum q (log q - log m) + (1-beta) k with k = sum p (log p - log m); gradient (1-beta) p (log p - log m - k)."""
        p = torch.exp(log_p, out=tiles.take("p", log_p, *log_p.shape))
        q = torch.exp(log_q, out=tiles.take("q", log_q, *log_q.shape))
        # m underflows only where p and q do; the floor keeps 0 x log 0 at 0
        log_m = torch.lerp(p, q, self.beta, out=tiles.take("m", log_p, *log_p.shape))
        log_m.clamp_(min=torch.finfo(log_m.dtype).tiny).log_()
        from_teacher = torch.linalg.vecdot(q, log_q.sub_(log_m))
        gap = log_p.sub_(log_m)
        k = torch.linalg.vecdot(p, gap)
        if with_gradient:
            gap.sub_(k[:, None]).mul_(p).mul_(1 - self.beta)
        return self.beta * from_teacher + (1 - self.beta) * k


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    if device.type != "cpu":
        return 256
    return max(8, min(1024, TILE_BYTES // (4 * vocabulary)))


def project(hidden: Tensor, head: Tensor, tiles: Tiles, name: str) -> Tensor:
    """hidden [n, H] times head [V, H], as fp32 logits [n, V] (fp64 for fp64), in a tile of that name."""
    wide = torch.promote_types(head.dtype, torch.float32)
    logits = tiles.take(name, head, len(hidden), len(head), wide)
    with torch.no_grad():
        if head.dtype == wide:
            return torch.mm(hidden.to(wide), head.T, out=logits)
        narrow = tiles.take(f"{name} narrow", head, len(hidden), len(head))
        return logits.copy_(torch.mm(hidden.to(head.dtype), head.T, out=narrow))


class HeadLoss(torch.autograd.Function):
    """sum(weights * objective). The gradient is formed in the forward, so backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, head, weights, objective, chunk, values):
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        kind = hidden.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        with torch.autocast(kind, enabled=False):
            narrow_head = head.detach().to(compute)
            hidden_gradient = torch.empty_like(hidden) if need_hidden else None
            # fp32 sums: rounding every chunk's product to bf16 would bias the gradient
            head_gradient = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if need_head else None
            tiles = Tiles()
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, min(start + chunk, len(hidden)))
                part = hidden.detach()[rows].to(compute)
                logits = project(part, narrow_head, tiles, "student")
                losses = objective(logits, rows, need_hidden or need_head, tiles)
                if not torch.isfinite(losses).all():
                    raise NotFinite("The loss", start + int((~torch.isfinite(losses)).nonzero()[0]))
                values[rows] = losses.to(values.dtype)
                total += (losses.double() * weights[rows].double()).sum()
                if need_hidden or need_head:
                    logits *= weights[rows, None].to(logits.dtype)
                    gradient = logits.to(compute)
                if need_hidden:
                    hidden_gradient[rows] = gradient @ narrow_head
                if need_head:
                    if compute == head_gradient.dtype:
                        head_gradient.addmm_(gradient.T, part)
                    else:
                        head_gradient += gradient.T @ part
            ctx.gradients, ctx.head_dtype = (hidden_gradient, head_gradient), head.dtype
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None  # once: the tensors are scaled in place, a copy of the head's would be 1.6 GB for a 4 B model
        if hidden_gradient is not None:
            hidden_gradient.mul_(upstream.to(hidden_gradient.dtype))
        if head_gradient is not None:
            head_gradient = head_gradient.mul_(upstream.to(head_gradient.dtype)).to(ctx.head_dtype)
        return hidden_gradient, head_gradient, None, None, None, None


def head_loss(hidden: Tensor, head: Tensor, weights: Tensor, objective: Objective, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """(sum over positions of weight x loss, the losses [N] without graph).

    hidden [N, H] of the positions that count only; head [V, H]; weights [N]. N = 0 gives a zero that is part of the graph.
    Raises NotFinite.
    """
    values = torch.zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    if not len(hidden):
        return hidden.sum() * 0 + head[:1].sum() * 0, values
    chunk = chunk or rows_per_chunk(len(head), hidden.device)
    return HeadLoss.apply(hidden, head, weights, objective, chunk, values), values

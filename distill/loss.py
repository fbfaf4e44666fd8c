"""The loss in chunks, with its closed-form gradient: no logits of a whole batch ever exist.

`head_loss(hidden, head, weights, objective)` projects the hidden states of the positions that count, chunk by chunk, asks the
objective for value and gradient at the logits, and folds the gradient back at once. Memory is a few tiles [n, V], whatever N.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distill.errors import DistillError

TILE_BYTES = 32 << 20  # of one [n, V] fp32 tile on a CPU; a GPU takes 256 rows (0.16 GB at V = 151,936)


class NotFinite(DistillError):
    """NaN or infinity in teacher, student or loss. `row`: the position among those given."""

    def __init__(self, what: str, row: int):
        super().__init__(f"{what} is NaN or infinite at position {row} of the batch; nothing was changed by this step.")
        self.what, self.row = what, row


class Objective(Protocol):
    """What is minimised, position by position."""

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        """Values [n] for student logits [n, V] fp32; with_gradient: `logits` becomes the gradient at the logits."""


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label). labels [N] int64."""

    labels: Tensor

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        labels = self.labels[rows, None]
        chosen = logits.gather(1, labels).squeeze(1)
        normal = torch.logsumexp(logits, dim=1)
        if with_gradient:
            torch.exp(logits.sub_(normal[:, None]), out=logits)
            logits.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=logits.dtype))
        return normal - chosen


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

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        with torch.no_grad():
            teacher = project(self.teacher[rows].to(self.teacher_head.device), self.teacher_head)
        width = min(logits.shape[1], teacher.shape[1])  # padded heads: what lies beyond is no token
        student, outside = logits[:, :width], logits[:, width:]
        teacher = teacher[:, :width].to(logits.dtype)
        if self.temperature != 1:
            student.div_(self.temperature)
            teacher.div_(self.temperature)
        if self.beta == 0:
            values = self.forward_kl(student, teacher, with_gradient)
        elif self.beta == 1:
            values = self.reverse_kl(student, teacher, with_gradient)
        else:
            values = self.jensen_shannon(student, teacher, with_gradient)
        scale = 1 / (self.beta * (1 - self.beta)) if self.normalize and 0 < self.beta < 1 else 1.0
        if with_gradient:
            if scale != self.temperature:
                student.mul_(scale / self.temperature)
            outside.zero_()
        return values * scale if scale != 1 else values

    @staticmethod
    def forward_kl(s: Tensor, t: Tensor, with_gradient: bool) -> Tensor:
        """sum q (log q - log p); gradient p - q. Both arguments are overwritten."""
        normal_s, normal_t = torch.logsumexp(s, 1, keepdim=True), torch.logsumexp(t, 1, keepdim=True)
        gap = t - s
        q = torch.exp(t.sub_(normal_t), out=t)
        values = torch.linalg.vecdot(q, gap) - (normal_t - normal_s).squeeze(1)
        if with_gradient:
            torch.exp(s.sub_(normal_s), out=s).sub_(q)
        return values

    @staticmethod
    def reverse_kl(s: Tensor, t: Tensor, with_gradient: bool) -> Tensor:
        """k = sum p (log p - log q); gradient p (log p - log q - k)."""
        normal_s, normal_t = torch.logsumexp(s, 1, keepdim=True), torch.logsumexp(t, 1, keepdim=True)
        gap = torch.sub(s, t, out=t).sub_(normal_s - normal_t)
        p = torch.exp(s.sub_(normal_s), out=s)
        values = torch.linalg.vecdot(p, gap)
        if with_gradient:
            p.mul_(gap.sub_(values[:, None]))
        return values

    def jensen_shannon(self, s: Tensor, t: Tensor, with_gradient: bool) -> Tensor:
        """beta sum q (log q - log m) + (1-beta) k with k = sum p (log p - log m); gradient (1-beta) p (log p - log m - k)."""
        beta = self.beta
        s.sub_(torch.logsumexp(s, 1, keepdim=True))
        t.sub_(torch.logsumexp(t, 1, keepdim=True))
        p, q = torch.exp(s), torch.exp(t)
        # m may underflow only where p and q do; the floor keeps 0 x log 0 at 0
        log_m = torch.lerp(p, q, beta).clamp_(min=torch.finfo(s.dtype).tiny).log_()
        from_teacher = torch.linalg.vecdot(q, t.sub_(log_m))
        gap = s.sub_(log_m)
        k = torch.linalg.vecdot(p, gap)
        if with_gradient:
            gap.sub_(k[:, None]).mul_(p).mul_(1 - beta)
        return beta * from_teacher + (1 - beta) * k


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    if device.type != "cpu":
        return 256
    return max(8, min(1024, TILE_BYTES // (4 * vocabulary)))


def project(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [n, H] times head [V, H], as fp32 logits [n, V] (fp64 for fp64)."""
    logits = hidden @ head.T
    return logits if logits.dtype == torch.float64 else logits.float()


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
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, min(start + chunk, len(hidden)))
                part = hidden.detach()[rows].to(compute)
                logits = project(part, narrow_head)
                losses = objective(logits, rows, need_hidden or need_head)
                if not torch.isfinite(losses).all():
                    raise NotFinite("The loss", start + int((~torch.isfinite(losses)).nonzero()[0]))
                values[rows] = losses.to(values.dtype)
                total += (losses.double() * weights[rows].double()).sum()
                if need_hidden or need_head:
                    logits *= weights[rows, None].to(logits.dtype)
                    gradient = logits.to(compute)
                if need_hidden:
                    torch.mm(gradient, narrow_head, out=hidden_gradient[rows]) if hidden_gradient.dtype == compute else (
                        hidden_gradient[rows].copy_(gradient @ narrow_head)
                    )
                if need_head:
                    if compute == head_gradient.dtype:
                        head_gradient.addmm_(gradient.T, part)
                    else:
                        head_gradient += gradient.T @ part
            ctx.save_for_backward(hidden_gradient, head_gradient)
            ctx.head_dtype = head.dtype
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, head_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * upstream.to(hidden_gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * upstream.to(head_gradient.dtype)).to(ctx.head_dtype)
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

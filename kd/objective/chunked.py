"""Hidden states -> summed losses and their gradients, chunk by chunk.

Only this module applies softmax, truncation, temperature and chunking. For each chunk of rows it computes the loss and
at once the gradients with respect to logits, hidden states and head. So no tensor of width V outlives a chunk, for any
loss, and no product with the head is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kd.objective.output_layer import output_layer
from kd.objective.target import Target
from kd.objective.temperature import Softening, soften
from kd.objective.token_info import TokenInfo, check_needs
from kd.system.compilation import compile_if_possible

Signal = Callable[[slice], Target]  # distributions of a source of logits for a batch: rows -> Target


def with_token_info(signal: Signal, info: TokenInfo) -> Signal:
    """Return the signal with information about each position [N] in its targets."""
    return lambda rows: replace(signal(rows), token_info=info[rows])


class LossSums(NamedTuple):
    """Sums over positions, nats; only `total` carries a gradient."""

    total: Tensor  # alpha * kd + (1 - alpha) * lm
    kd: Tensor
    lm: Tensor


@dataclass(frozen=True)
class Objective:
    """Comparison of student and teacher, `chunk` positions at a time.

    chunk: None takes `default_chunk_size`. It changes only time, memory and rounding. compile: True makes one kernel of
    the loss and gradient of a chunk's logits by torch.compile, which needs a C++ compiler and some ten seconds once.
    None does so too, and computes without torch.compile if that fails.
    """

    loss: Callable[[Tensor, Target], Tensor]
    truncation: Callable[[Target], Target]
    target_transform: Callable[[Target], Target]
    temperature: Callable[[Tensor, Target], Softening]
    chunk: int | None = None
    compile: bool | None = False

    def distillation_loss(self, student: Tensor, target: Target, truncated: Target | None = None) -> Tensor:
        """Return the distillation loss per position [N] for student log-probabilities [N, V].

        Order: truncate (unless `truncated` is given), distribute the dropped probability, soften. The temperature is
        computed from the target before truncation.
        """
        softening = self.temperature(student, target)
        softened = self.target_transform(truncated or self.truncation(target)).soften(softening.teacher)
        return softening.weight * self.loss(soften(student, softening.student), softened)

    def __call__(
        self, head: torch.nn.Module, hidden: Tensor, label: Tensor, signal: Signal | None, alpha: float,
        observe_logits: Callable[[slice, Tensor], None] | None = None, kd_mask: Tensor | None = None,
    ) -> LossSums:  # fmt: skip
        """Return alpha * distillation + (1 - alpha) * language modelling, summed over the rows of hidden [N, D].

        head: maps hidden states to logits and has parameters. signal: None makes the distillation term 0.
        observe_logits: called with the student's logits [n, V] of each chunk. kd_mask: [N]; alpha is 0 where it is
        False.
        """
        parameters = [p for p in head.parameters() if p.requires_grad]
        return LossSums(*_Chunked.apply(self, head, label, signal, alpha, observe_logits, kd_mask, hidden, *parameters))

    def language_modelling(self, head: torch.nn.Module, hidden: Tensor, label: Tensor) -> Tensor:
        """Return the language-modelling loss of hidden [N, D], summed over positions, in nats."""
        return self(head, hidden, label, None, 0.0).total

    def logits_gradient(
        self, logits: Tensor, label: Tensor, target: Target | None, alpha: Tensor, kd_mask: Tensor | None = None,
        truncated: Target | None = None,
    ) -> tuple[Tensor, LossSums]:  # fmt: skip
        """Return the gradient of `total` with respect to the student's logits [n, V], and the sums."""
        student, chain = torch.func.vjp(lambda logits: logits.float().log_softmax(-1), logits)  # [n, V]
        lm = -student.gather(-1, label[:, None])  # [n, 1]
        share = 1 - (alpha if kd_mask is None else alpha * kd_mask[:, None])  # of language modelling
        if target is None:
            grad, kd = torch.zeros_like(student), torch.zeros_like(lm.sum())
        else:

            def distillation(student: Tensor) -> tuple[Tensor, Tensor]:
                kd = self.distillation_loss(student, target, truncated)
                kd = (kd if kd_mask is None else torch.where(kd_mask, kd, 0)).sum()
                return alpha * kd, kd

            grad, kd = torch.func.grad(distillation, has_aux=True)(student)
            grad = grad.contiguous()  # that of a sum over V is an expanded view, which cannot be added to
        # The gradient of language modelling is one number per row. Autograd would add a tensor [n, V] of zeros.
        grad.scatter_add_(-1, label[:, None], (-share).to(grad).expand(len(label), 1))
        return chain(grad)[0], LossSums(alpha * kd + (share * lm).sum(), kd, lm.sum())


def log_probabilities(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Return log-probabilities [n, V] of hidden states [n, D], in float32 for a head of any precision."""
    return head(hidden).float().log_softmax(-1)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` rows that together cover `count` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def default_chunk_size(head: torch.nn.Module) -> int:
    """Return the number of positions per chunk: float32 logits of 32 MiB, on a GPU 512 MiB; at least 64 positions.

    32 MiB stay near a CPU's caches. Below 64 positions there is too little work per read of the head's weights.
    """
    output = max(head.parameters(), key=len)  # [V, D]
    budget = 2**25 if output.device.type == "cpu" else 2**29
    return max(64, budget // (4 * len(output)))


def _compiled(objective: Objective) -> Callable:
    """Return compiled `logits_gradient`."""
    compiler = torch.compile if objective.compile else compile_if_possible
    return compiler(objective.logits_gradient)


class _Chunked(torch.autograd.Function):
    """Objective over all chunks. forward computes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx, objective: Objective, head, label, signal, alpha, observe_logits, kd_mask, hidden, *parameters):
        slope = objective.logits_gradient if objective.compile is False else _compiled(objective)
        alpha = torch.tensor(alpha, device=hidden.device)  # torch would compile again for each new number
        hidden_grad, layer = torch.empty_like(hidden), output_layer(head, hidden)
        sums = torch.zeros(3, device=hidden.device, dtype=torch.float64)
        for rows in chunks(len(hidden), objective.chunk or default_chunk_size(head)):
            target = signal(rows) if signal is not None else None
            if target is not None:
                check_needs(objective.loss, target.token_info)
            # Outside the compiled part: the number of columns of a top-p depends on the data.
            truncated = None if target is None else objective.truncation(target)
            logits = layer.logits(hidden[rows])  # [n, V]
            if observe_logits is not None:
                observe_logits(rows, logits)
            mask = kd_mask[rows] if kd_mask is not None else None
            logits_grad, values = slope(logits, label[rows], target, alpha, mask, truncated)
            hidden_grad[rows] = layer.backward(logits_grad)
            sums += torch.stack(values)
        ctx.save_for_backward(hidden_grad, *layer.gradients)
        total, kd, lm = sums.unbind()
        ctx.mark_non_differentiable(kd, lm)
        return total, kd, lm

    @staticmethod
    def backward(ctx, scale, *_):
        # In float32 first: 1 / tokens rounded to a bfloat16 would be off by up to 0.4 %.
        grads = ((grad.float() * scale.float()).to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, None, None, None, None, *grads

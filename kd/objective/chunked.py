"""Hidden states -> summed losses and their gradients, chunk by chunk.

Here, and nowhere else, happen the softmax, the truncation, the temperature and the chunking. For each chunk of rows the
loss and its gradient with respect to the logits, and from there to hidden states and head, are made at once, so nothing
of width V outlives a chunk, for any loss, and no head product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.func import functional_call

from kd.errors import first_line
from kd.objective.target import Target
from kd.objective.temperature import Softening, soften
from kd.objective.token_info import TokenInfo, check_needs
from kd.system.console import console

Signal = Callable[[slice], Target]  # what a logits source answers for a batch: rows -> Target


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
    """How a student is compared with its teacher, `chunk` positions at a time.

    chunk: None takes `default_chunk_size`; it changes nothing but time, memory and rounding. compile: make loss and
    gradient of a chunk's logits one kernel by torch.compile, which needs a C++ compiler and some ten seconds once;
    None does so on a GPU, and goes on without where that fails.
    """

    loss: Callable[[Tensor, Target], Tensor]
    truncation: Callable[[Target], Target]
    target_transform: Callable[[Target], Target]
    temperature: Callable[[Tensor, Target], Softening]
    chunk: int | None = None
    compile: bool | None = False

    def distillation_loss(self, student: Tensor, target: Target, truncated: Target | None = None) -> Tensor:
        """The distillation loss per position [N] for student log-probabilities [N, V].

        Order: truncate (unless `truncated` is there already), say where the dropped probability goes, then soften. The
        temperature is of the whole target.
        """
        softening = self.temperature(student, target)
        kept = self.target_transform(truncated or self.truncation(target)).soften(softening.teacher)
        return softening.weight * self.loss(soften(student, softening.student), kept)

    def __call__(
        self, head: torch.nn.Module, hidden: Tensor, label: Tensor, signal: Signal | None, alpha: float,
        observe_logits: Callable[[slice, Tensor], None] | None = None, kd_mask: Tensor | None = None,
    ) -> LossSums:  # fmt: skip
        """Sums over the rows of hidden [N, D] of alpha * distillation + (1 - alpha) * language modelling.

        head maps hidden states to logits and owns parameters; without a signal the distillation term is 0.
        observe_logits gets the student's logits [n, V], chunk by chunk. kd_mask: where it is False [N], alpha is 0.
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
        """The gradient of `total` with respect to the student's logits [n, V], and the sums."""
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
        # That of language modelling, one number per row, is put in its place; autograd would add [n, V] zeros.
        grad.scatter_add_(-1, label[:, None], (-share).to(grad).expand(len(label), 1))
        return chain(grad)[0], LossSums(alpha * kd + (share * lm).sum(), kd, lm.sum())


def log_probabilities(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Hidden states [n, D] -> log-probabilities [n, V], float32 whatever the precision of the head."""
    return head(hidden).float().log_softmax(-1)


def chunks(count: int, size: int) -> Iterator[slice]:
    """The slices of at most `size` rows that cover `count` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def default_chunk_size(head: torch.nn.Module) -> int:
    """How many positions to take at once: as many as fill 32 MiB with float32 logits, on a GPU 512 MiB; at least 64.

    32 MiB stay near a CPU's caches; fewer positions than 64 leave too little to do per read of the head's weights.
    """
    output = max(head.parameters(), key=len)  # [V, D]
    budget = 2**25 if output.device.type == "cpu" else 2**29
    return max(64, budget // (4 * len(output)))


_compile_failed = False  # in this process; said once


def _compiled(objective: Objective) -> Callable:
    """Compiled `slope`. Where compiling is a default, what torch cannot compile is computed as it is."""
    compiled = torch.compile(objective.logits_gradient)
    if objective.compile:
        return compiled

    def slope(*arguments) -> tuple[Tensor, LossSums]:
        global _compile_failed
        if not _compile_failed:
            try:
                return compiled(*arguments)
            except TorchDynamoException as error:
                _compile_failed = True
                reason = first_line(error)
                console.print(
                    f"torch.compile failed, so the loss is slower and takes more memory than it could: {reason}\n"
                    "trainer.compile=false leaves it out; trainer.compile=true shows all of the error.",
                    soft_wrap=True,
                )  # fmt: skip
        return objective.logits_gradient(*arguments)

    return slope


def _cast(head: torch.nn.Module, device: str) -> dict[str, Tensor]:
    """The head's parameters in the dtype that autocast computes in, as leaves of their own.

    Cast once instead of with every chunk, they get their gradients in that dtype, which are added up in float32.
    """
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return {
        name: p if dtype is None else p.detach().to(dtype).requires_grad_(p.requires_grad)
        for name, p in head.named_parameters()
    }


class _Chunked(torch.autograd.Function):
    """Objective over all chunks: forward already makes the gradients, backward only scales them."""

    @staticmethod
    def forward(ctx, objective: Objective, head, label, signal, alpha, observe_logits, kd_mask, hidden, *parameters):
        compiles = hidden.is_cuda if objective.compile is None else objective.compile
        slope = _compiled(objective) if compiles else objective.logits_gradient
        alpha = torch.tensor(alpha, device=hidden.device)  # a number would be compiled in, and anew when it changes
        hidden_grad = torch.empty_like(hidden)
        parameter_grads = [torch.zeros_like(p) for p in parameters]
        weights = _cast(head, hidden.device.type)
        learned = [w for w in weights.values() if w.requires_grad]
        sums = torch.zeros(3, device=hidden.device, dtype=torch.float64)
        for rows in chunks(len(hidden), objective.chunk or default_chunk_size(head)):
            target = signal(rows) if signal is not None else None
            if target is not None:
                check_needs(objective.loss, target.token_info)
            # Not within what is compiled: how many columns a top-p keeps is seen when it is computed.
            truncated = None if target is None else objective.truncation(target)
            with torch.enable_grad():
                piece = hidden[rows].detach().requires_grad_()
                logits = functional_call(head, weights, (piece,))  # [n, V]
            if observe_logits is not None:
                observe_logits(rows, logits.detach())
            which = kd_mask[rows] if kd_mask is not None else None
            logits_grad, values = slope(logits.detach(), label[rows], target, alpha, which, truncated)
            hidden_grad[rows], *parts = torch.autograd.grad(logits, (piece, *learned), logits_grad)
            for whole, part in zip(parameter_grads, parts, strict=True):
                whole += part
            sums += torch.stack(values)
        ctx.save_for_backward(hidden_grad, *parameter_grads)
        total, kd, lm = sums.unbind()
        ctx.mark_non_differentiable(kd, lm)
        return total, kd, lm

    @staticmethod
    def backward(ctx, scale, *_):
        # In float32 first: 1 / tokens rounded to a bfloat16 would be off by up to 0.4 %.
        grads = ((grad.float() * scale.float()).to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, None, None, None, None, *grads

"""Distillation loss of logits, for a trainer of one's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd.data.batches import IGNORE
from kd.errors import UserError
from kd.objective import losses, target_transforms, temperature, truncation
from kd.objective.chunked import Objective
from kd.objective.target import Target
from kd.objective.temperature import Softening
from kd.objective.token_info import TokenInfo, check_needs


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor, Target], Tensor] = losses.fkl,
    truncation: Callable[[Target], Target] = truncation.full,
    target: Callable[[Target], Target] = target_transforms.renormalise,
    temperature: Callable[[Tensor, Target], Softening] = temperature.fixed,
    reduction: str = "mean",
) -> Tensor:
    """Return the distillation loss of logits, in nats, as a run of kd with the same options has it.

    student_logits, teacher_logits: [..., V]. labels: [...], the true next token of each position; -100 where a position
    does not count. Logits and labels are aligned: of a causal model, pass `logits[:, :-1]` and `ids[:, 1:]`.
    loss, truncation, target, temperature: functions; bind their options by functools.partial. reduction: "mean" over
    the N positions that count, "sum", or "none", which returns [N].
    The teacher's logits get no gradient, and language modelling is not included. truncation.random takes its random
    numbers from torch's generator. Raises UserError for shapes that do not agree, for a component by its name, and for
    a loss that needs what only a run has, such as an advantage.

        loss = kd.distillation_loss(student(ids).logits[:, :-1], teacher(ids).logits[:, :-1], ids[:, 1:],
                                    loss=partial(kd.losses.akl, mu=0.3), truncation=partial(kd.truncation.top_k, k=50))
    """
    chosen: dict[str, Callable] = {"loss": loss, "truncation": truncation, "target": target, "temperature": temperature}
    _check(student_logits, teacher_logits, labels, chosen, reduction)
    check_needs(loss, TokenInfo())
    counted = labels != IGNORE
    label = labels[counted]  # [N]
    with torch.no_grad():
        logp = teacher_logits[counted].float().log_softmax(-1)  # [N, V]
        seed = torch.randint(2**62, label.shape, device=label.device)
    student = student_logits[counted].float().log_softmax(-1)
    objective = Objective(loss, truncation, target, temperature)
    values = objective.distillation_loss(student, Target(label, logp, seed=seed, complete=True))
    if reduction == "none":
        return values
    return values.sum() / (max(1, len(label)) if reduction == "mean" else 1)


def _check(
    student: Tensor, teacher: Tensor, labels: Tensor, chosen: dict[str, Callable], reduction: str
) -> None:  # fmt: skip
    """Raise UserError for arguments that do not agree."""
    for name, function in chosen.items():
        if not callable(function):
            module = "targets" if name == "target" else "losses" if name == "loss" else name
            raise UserError(option=name, got=function, need="a function", hint=f"pass e.g. kd.{module}.{function}")
    if student.shape != teacher.shape:
        raise UserError(
            option="teacher_logits",
            why=f"have the shape {list(teacher.shape)}, and student_logits {list(student.shape)}",
            need="logits of the same tokens over the same vocabulary",
            hint="cut a padded vocabulary to what both models share",
        )
    if labels.shape != student.shape[:-1]:
        raise UserError(
            option="labels",
            why=f"have the shape {list(labels.shape)}, and the logits {list(student.shape)}",
            need="a label per position, aligned with the logits",
            hint="pass logits[:, :-1] and ids[:, 1:]",
        )
    if reduction not in ("mean", "sum", "none"):
        raise UserError(option="reduction", got=reduction, need="mean, sum or none")

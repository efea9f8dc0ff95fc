"""Terms of an optimizer step's loss, and the report of what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from kd.data.batches import Batch


@dataclass(frozen=True)
class LossTerm:
    """Part of a step's loss: distillation and language modelling on a batch, with these weights. None omits a loss."""

    batch: Batch
    kd: float | None
    lm: float | None
    target_tokens: int  # all ranks
    positions: int  # all ranks, prompts and padding included
    student_tokens: int  # target tokens that the student wrote, all ranks


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step, over all ranks."""

    metrics: dict[str, float]  # means of the losses per target token, and norms of the gradients
    lr: float
    alpha: float | None  # None without a training signal
    tokens: int  # target tokens
    positions: int  # FLOPs of the student
    teacher_positions: int
    rollout_tokens: dict[str, float] = field(default_factory=dict)  # tokens that student and teacher read for sampling

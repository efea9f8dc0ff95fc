"""Teachers that run inside the training step."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.data.batches import Batch
from kd.models.causal_lm import CausalLM
from kd.models.flops import Cost
from kd.objective.signals import ProjectedSignal
from kd.teachers.base import Teacher, TeacherOrigin, project


def online(origin: TeacherOrigin) -> Teacher:
    """The teacher runs inside the training step; its output layer is applied only to the requested rows."""
    return OnlineTeacher(origin.model, origin.cost)


class OnlineTeacher(Teacher):
    """Frozen language model that is evaluated on every batch.

    Only its body runs ahead; the output layer is applied to the positions that the objective asks for, so [N, V] is
    never held.
    """

    def __init__(self, model: CausalLM | None, cost: Cost | None = None):
        self.model, self.cost = model and model.eval().requires_grad_(False), cost

    @torch.no_grad()
    def signal(self, batch: Batch, mask: Tensor) -> ProjectedSignal:
        return project(self.model, batch, mask)

    def reference(self, batch: Batch, mask: Tensor) -> ProjectedSignal:
        return self.signal(batch, mask)

    def flops_per_token(self, selects_tokens: bool) -> float:
        assert self.cost is not None, "the cost of a teacher's model is known before it is asked for"
        return self.cost.flops_per_token + (2 * self.cost.output if selects_tokens else 0)  # its head runs twice

"""Teachers that learn in the same steps as the student."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.data.batches import Batch
from kd.models.causal_lm import CausalLM
from kd.models.flops import Cost
from kd.objective.chunked import Objective, Signal
from kd.objective.signals import ProjectedSignal
from kd.teachers.base import Teacher, TeacherOrigin, project, traits


@traits("trains_teacher")
def cotrained(origin: TeacherOrigin) -> Teacher:
    """The teacher learns beside the student in one run, by language modelling on the same batches.

    It has the steps, batches and learning rate of the run; of the settings teacher.…, only the model and teacher.seed
    have an effect.
    """
    return CotrainedTeacher(origin.model, origin.cost)


class CotrainedTeacher(Teacher):
    """Language model that is trained on the same batches as the student, by language modelling.

    Peng et al. 2024, arXiv 2410.16215, section 3.4, compare logits recorded during pre-training; this is the limit
    where both train at once.
    """

    trainable = True

    def __init__(self, model: CausalLM | None, cost: Cost | None = None):
        self.model, self.cost = model, cost

    def signal(self, batch: Batch, mask: Tensor) -> ProjectedSignal:
        return project(self.model, batch, mask)

    @torch.no_grad()
    def reference(self, batch: Batch, mask: Tensor) -> ProjectedSignal:
        return project(self.model, batch, mask)

    def own_loss(self, batch: Batch, mask: Tensor, signal: Signal, objective: Objective) -> Tensor:
        assert isinstance(signal, ProjectedSignal), "this teacher's signal comes from its hidden states"
        return objective.language_modelling(signal.head, signal.features, batch.labels[mask])

    def flops_per_token(self, selects_tokens: bool) -> float:
        assert self.cost is not None, "the cost of a teacher's model is known before it is asked for"
        return self.cost.flops_per_token * (4 if selects_tokens else 3)  # selection has a forward pass of its own

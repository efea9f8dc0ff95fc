"""Exposure bias: excess accumulated error of a student on its own text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.evaluation import metrics
from kd.models.causal_lm import CausalLM
from kd.objective import losses
from kd.objective.chunked import chunks, default_chunk_size, log_probabilities
from kd.parallel import collectives
from kd.rollout import generate
from kd.teachers.base import Teacher

# Measures of the models


def excess_error(after_student: Tensor, after_teacher: Tensor) -> Tensor:
    """Excess accumulated error over the length l = 1 … L of a response [L], a share: (R(l) - l eps(l)) / (l eps(l)).

    R(l) is the sum over t <= l of the mean KL(p || q) at token t after text of the student; l eps(l) is the same sum
    after text of the teacher. after_student, after_teacher [T, 2]: for each t the number of responses that have a token
    t, and the sum of their KL. L is the last t that both have. The value is 0 if errors do not accumulate; papers print
    per cent.
    Arora et al. 2022, arXiv 2204.01171; Gu et al. 2023, arXiv 2306.08543, section 3.3, where p is the teacher as here.
    In MiniLLM's code a response that has ended counts as one without error; here it no longer counts.
    """
    sides = after_student, after_teacher
    both = int(((after_student[:, 0] > 0) & (after_teacher[:, 0] > 0)).long().cumprod(0).sum())
    regret, expected = ((kl / count).cumsum(0) for count, kl in (x[:both].double().unbind(-1) for x in sides))
    return (regret - expected) / expected.clamp(min=1e-9)  # of a student that is its teacher, 0 / 0 is 0


class TeacherGap(NamedTuple):
    """Divergence of student and teacher on some text."""

    by_place: Tensor  # [T, 4] positions, and sums of KL(p || q), KL(q || p) and total variation, by token of a response
    bins: Tensor  # [BINS, 3] of the student's confidence, where the teacher's distribution is the truth

    def means(self) -> dict[str, float]:
        """Return the means over all tokens."""
        count, _, rkl, tvd = self.by_place.sum(0).tolist()
        return {"rkl": rkl / count, "tvd": tvd / count, "ece": metrics.calibration_error(self.bins)}


@torch.no_grad()
def teacher_gap(
    student: CausalLM, teacher: Teacher, batches: Iterable[Batch], length: int, chunk: int | None
) -> TeacherGap:
    """Return the divergence of student and teacher at the target positions of batches, on all ranks.

    length: positions per row.
    """
    device = next(student.parameters()).device
    by_place = torch.zeros(length, 4, dtype=torch.float64, device=device)
    bins = torch.zeros(metrics.BINS, 3, dtype=torch.float64, device=device)
    for batch in batches:
        batch = move_data_to_device(batch, device)
        mask = batch.labels != IGNORE
        place = (torch.arange(length, device=device) - generate.prompt_lengths(batch)[:, None] + 1)[mask]  # [N]
        signal, hidden = teacher.reference(batch, mask), student.hidden_states(*batch.inputs)[mask]
        assert signal is not None, "a teacher with a model has complete distributions"
        for rows in chunks(len(place), chunk or default_chunk_size(student.head)):
            q, target = log_probabilities(student.head, hidden[rows]), signal(rows)
            divergences = [measure(q, target).double() for measure in (losses.fkl, losses.rkl, losses.tvd)]
            by_place.index_add_(0, place[rows], torch.stack([torch.ones_like(divergences[0]), *divergences], -1))
            bins += metrics.bins_by_teacher(q, target)
    parts = collectives.all_gather((by_place.cpu(), bins.cpu()))
    return TeacherGap(*(sum(x) for x in zip(*parts, strict=True)))

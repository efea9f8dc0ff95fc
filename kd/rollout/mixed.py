"""Teacher-mixed sampling and returns: MiniLLM, Gu et al. 2023, arXiv 2306.08543, section 2.2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.objective.token_info import TokenInfo
from kd.parallel import collectives
from kd.rollout.base import Rollout
from kd.rollout.rows import token_info_of
from kd.rollout.samplers import Samplers


@torch.no_grad()
def returns(reward: Tensor, mask: Tensor, gamma: float, length_norm: bool, exclude_own_reward: bool) -> Tensor:
    """Return the return of each position [B, T]: G_t = r_t + gamma G_{t+1}, with r = 0 where mask is False.

    exclude_own_reward: return G_{t+1} in place of G_t, which is 0 at the last position. The paper's long-term part has
    this form, beside the exact single step. length_norm: divide by the number of rewards in the sum. Gu et al. 2023,
    arXiv 2306.08543, section 2.2; the discount is in their code alone. The result is 0 where mask is False.
    """
    mask = mask.to(reward.dtype)
    total, earned = torch.zeros_like(reward[:, 0]), []
    for r in reward.mul(mask).flip(-1).unbind(-1):
        after, total = total, r + gamma * total
        earned.append(after if exclude_own_reward else total)
    earned = torch.stack(earned, -1).flip(-1)  # [B, T]
    if length_norm:
        counted = mask.flip(-1).cumsum(-1).flip(-1) - (mask if exclude_own_reward else 0)
        earned = earned / counted.clamp(min=1)
    return earned * mask


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return x [B, T] with mean 0 and variance 1 over the positions of all ranks where mask is True; 0 elsewhere."""
    mask = mask.double()
    count = collectives.all_reduce_sum(mask.sum()).clamp(min=1)
    mean = collectives.all_reduce_sum((x * mask).sum()) / count
    variance = collectives.all_reduce_sum(((x - mean).square() * mask).sum()) / count
    return ((x - mean) * (variance + 1e-8).rsqrt() * mask).to(x.dtype)


class TeacherMixedSampling(Rollout):
    """Sampling from teacher and student. State: the current batch, and its number among the sampled batches."""

    def __init__(
        self, samplers: Samplers | None, sampling: dict, scale: float, clip: float | None, returned: dict, whiten: bool,
        epochs: int,
    ):  # fmt: skip
        super().__init__(samplers, **sampling)
        self.scale, self.clip, self.returned = scale, clip, returned
        self.whiten, self.epochs, self.sampling_rate = whiten, epochs, 1 / epochs
        self.batch: Batch | None = None
        self.round = -1

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        if step // self.epochs != self.round:
            self.batch, self.round = self.write(batch), step // self.epochs
        from lightning.fabric.utilities import move_data_to_device  # takes 2 s, which the check of a sweep saves

        return move_data_to_device(self.batch, batch.ids.device)  # a checkpoint is loaded to the CPU

    def write(self, batch: Batch) -> Batch:
        written = self.samplers.write(batch, "student", "teacher", **self.sampling)
        info = token_info_of(written)
        advantage = self._advantage(info, written.labels != IGNORE)
        return written._replace(token_info=replace(info, advantage=advantage))

    def _advantage(self, info: TokenInfo, counted: Tensor) -> Tensor:
        reward = (info.teacher_logp - info.student_logp) / self.scale
        if self.clip is not None:
            reward = reward.clamp(-self.clip, self.clip)
        earned = returns(reward, counted, **self.returned)
        return whiten(earned, counted) if self.whiten else earned

    def state(self) -> dict:
        if self.epochs == 1 or self.batch is None:
            return {}
        given = {name: x.cpu() for name, x in self.batch._asdict().items() if isinstance(x, Tensor)}
        return given | {"token_info": token_info_of(self.batch).to("cpu").provided(), "round": self.round}

    def load(self, state: dict) -> None:
        if state:
            given = {name: x for name, x in state.items() if name != "round"}
            self.batch = Batch(**given | {"token_info": TokenInfo(**state["token_info"])})
            self.round = state["round"]
        else:
            self.batch, self.round = None, -1

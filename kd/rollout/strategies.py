"""Who writes the text that a student learns on: writers -> Rollout, and rollout(batch, step, progress) -> Batch.

A rollout is asked once for every optimizer step, for the whole of it, before it is cut into micro-batches. What it
writes is a function of the seed, the step, the weights and its own state, so a resumed run writes what it would have
written. q is the student, p the teacher, r_t = log p(y_t) - log q(y_t).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError, check
from kd.models.causal_lm import CausalLM
from kd.objective.token_info import TokenInfo, provides
from kd.parallel import collectives
from kd.rollout import generate
from kd.rollout.vllm import Engine, check_installed

RISE = 0.1  # of the threshold of `adaptive`, each time


@dataclass
class Writers:
    """The models that can write, and how much they have written. rows: at most so many at once; None for all."""

    student: CausalLM | None
    teacher: CausalLM | None
    end: int | None  # the token that ends a response; None for text without responses
    seed: int
    rows: int | None = None
    tokens: int = 0  # written so far
    seconds: float = 0.0  # that it took
    read: dict[str, int] = field(default_factory=lambda: {"student": 0, "teacher": 0})  # tokens, prompts too
    engines: dict[str, Engine] = field(default_factory=dict)
    between: Callable[[], None] = lambda: None  # called before each `rows`

    def write(self, batch: Batch, *names: str, engine: str = "kd", **how) -> Batch:
        """What the student, the teacher, or the mixture of both write for a batch; how: see kd.rollout.generate.write.

        engine: kd, or for one of them vllm.
        """
        models = {name: getattr(self, name) for name in names}
        if None in models.values():
            raise UserError(
                option="rollout",
                why="needs a teacher that writes responses, and this run has none",
                hint="type logits=online and a teacher, or rollout=none",
            )
        assert self.end is not None, "a response ends with a token"
        start = time.perf_counter()
        salt = {"student": 1, "teacher": 2}[names[-1]] << 32  # the numbers as they are draw samples of the teacher
        if engine == "vllm":
            (name,) = names
            if name not in self.engines:
                self.engines[name] = Engine(models[name], batch.ids.shape[1], learns=name == "student")
            written = [self.engines[name].write(batch, self.end, batch.seed[:, 0] ^ salt, **how)]
        else:
            parts = batch._replace(stored=None).split(self.rows or len(batch.ids))
            written = []
            for part in parts:
                self.between()
                written.append(generate.write(part, self.end, part.seed[:, 0] ^ salt, **models, **how))
        self.seconds += time.perf_counter() - start
        new = sum(int((part.labels != IGNORE).sum()) for part in written)
        self.tokens += new
        for name in names:
            self.read[name] += new + int(generate.lengths(batch).clamp(max=batch.ids.shape[1]).sum())
        return _joined(written)

    def chance(self, step: int) -> np.random.Generator:
        """Random numbers of a step, the same on all ranks."""
        return np.random.default_rng([self.seed, step, 2])


class Rollout:
    """The text of each step as it comes; others write some of it anew.

    `state` holds tensors and numbers. write() is what is written anew for a batch, in the way `how`, at the share
    `writes` of the steps, at most. The functions below, which build rollouts, declare the TokenInfo of every batch.
    """

    writes = 0.0
    looks_first = False  # whether it is to be told of a validation before the first step

    def __init__(self, writers: Writers | None, **how):
        self._writers, self.how = writers, how

    @property
    def writers(self) -> Writers:
        """Models that write; a rollout that is only planned has none."""
        assert self._writers is not None, "this rollout was built to be planned"
        return self._writers

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        """The batch of a step, at which the share `progress` of the run is done."""
        return self.write(batch)

    def write(self, batch: Batch) -> Batch:
        """The batch with new responses, where there are any."""
        return batch

    def validated(self, loss: float) -> None:
        """Told of each validation: the student's loss on the references, nats per token."""

    def state(self) -> dict:
        """What a checkpoint has to keep for load()."""
        return {}

    def is_own(self, state: dict) -> bool:
        """Whether a state() holds text that one rank alone has."""
        return bool(state)

    def load(self, state: dict) -> None:
        """Go on from a state()."""


def none(writers: Writers | None) -> Rollout:
    """The text of the data."""
    return Rollout(writers)


@provides("by_student")
def student(
    writers: Writers | None, share: float = 0.5, temperature: float = 1.0, top_k: int | None = None,
    top_p: float = 1.0, max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """The student writes a share of the batches, each as a whole, and the others are data.

    On-policy distillation, GKD: Agarwal et al. 2023, arXiv 2306.13649, algorithm 1, where share is lambda. share=1 with
    loss=rkl takes the reverse KL over the whole vocabulary; what Thinking Machines 2025 call on-policy distillation has
    its estimate by the token that was drawn, as `mixed` with teacher_share=0 gamma=0 from_next=false length_norm=false.
    Raises UserError for a share outside [0, 1], and here as below for what generate.write cannot take.
    """
    check("rollout.share", share, 0 <= share <= 1, "a share of the batches from 0 to 1")
    return Student(writers, share, **_sampling(temperature, top_k, top_p, max_tokens, engine))


def teacher(
    writers: Writers | None, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """The teacher writes every batch: sequence-level distillation, SeqKD. Kim & Rush 2016, arXiv 1606.07947.

    They take the teacher's best sequence by beam search; temperature=0 is the greedy one.
    """
    return Teacher(writers, **_sampling(temperature, top_k, top_p, max_tokens, engine))


@provides("by_student")
def pairs(
    writers: Writers | None, temperature: float = 0.8, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """Teacher and student both answer every prompt, so the batch has twice the rows: first the teacher's.

    For loss=distillm2, Ko et al. 2025, arXiv 2503.07067, who have them written anew for each of a few rounds, not for
    each step.
    """
    return Pairs(writers, **_sampling(temperature, top_k, top_p, max_tokens, engine))


@provides("by_student")
def adaptive(
    writers: Writers | None, threshold: float = 0.0, tolerance: float = 0.1, capacity: int = 1000,
    replay: str = "decreasing", temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """The student writes, or what it wrote is replayed, with a chance that rises as validation gets worse; else data.

    The chance starts at `threshold` and rises by 0.1 each time that the validation loss is at least `tolerance` nats
    above the last loss that made it rise, at first that before the first step. Of that chance, the share 1 - progress
    (replay=decreasing), 1/2 (constant) or progress (increasing) is for new text, and the rest for rows of the last
    `capacity` that the student wrote, once there are so many. Adaptive student-generated output and replay of Ko et al.
    2024 (DistiLLM), arXiv 2402.03898, sections 3.2 and 3.3, as in their code. Raises UserError for what has no meaning.
    """
    check("rollout.threshold", threshold, 0 <= threshold <= 1, "a chance from 0 to 1")
    check("rollout.tolerance", tolerance, tolerance >= 0, "a number of nats of at least 0")
    check("rollout.capacity", capacity, capacity >= 1, "at least 1 row, e.g. rollout.capacity=1000")
    check("rollout.replay", replay, replay in FRESH, f"one of {', '.join(FRESH)}")
    return Adaptive(
        writers, threshold, tolerance, capacity, replay, **_sampling(temperature, top_k, top_p, max_tokens, engine)
    )


@provides("student_logp", "teacher_logp", "importance", "advantage", "by_student")
def mixed(
    writers: Writers | None, teacher_share: float = 0.2, scale: float = 1.0, clip: float | None = None,
    gamma: float = 1.0, length_norm: bool = True, from_next: bool = True, whiten: bool = False, epochs: int = 4,
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, max_tokens: int | None = None,
) -> Rollout:  # fmt: skip
    """Teacher and student draw each token together, and each position is told what comes of it, for loss=minillm.

    Tokens are from teacher_share * p + (1 - teacher_share) * q. The advantage is the return (see `returns`) of rewards
    r_t / scale that are cut to [-clip, clip], and with `whiten` made to have mean 0 and variance 1. Each batch that is
    written is learned from in `epochs` steps, one after the other, with the prompts of the first.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, section 2.2. The defaults are the paper's; rollout=mixed_code has the
    values of the authors' code, from which this departs in four ways. There the plain text is learned from the teacher
    too, half and half. There whitening is over all positions of a mini-batch, padding among them; here over those that
    count, in the whole step. There 256 rows are collected and gone over four times in mini-batches; here what is
    collected is one batch. There no 6 tokens may be written twice. Raises UserError for what has no meaning.
    """
    check("rollout.teacher_share", teacher_share, 0 <= teacher_share <= 1, "a share from 0 to 1")
    check("rollout.scale", scale, scale > 0, "a number above 0")
    check("rollout.clip", clip, clip is None or clip > 0, "a number above 0, or null")
    check("rollout.gamma", gamma, 0 <= gamma <= 1, "a discount from 0 to 1")
    check("rollout.epochs", epochs, epochs >= 1, "at least 1 step")
    how = dict(share=teacher_share, **_sampling(temperature, top_k, top_p, max_tokens))
    returned = dict(gamma=gamma, length_norm=length_norm, from_next=from_next)
    return Mixed(writers, how, scale, clip, returned, whiten, epochs)


@torch.no_grad()
def returns(reward: Tensor, mask: Tensor, gamma: float, length_norm: bool, from_next: bool) -> Tensor:
    """What is earned from each position on [B, T]: G_t = r_t + gamma G_{t+1}, with r = 0 where mask is false.

    from_next: G_{t+1} in place of G_t, what is earned after t, as the paper's long term has it beside the exact single
    step; so it is 0 at the last position. length_norm: divided by how many rewards it sums. Gu et al. 2023, arXiv
    2306.08543, section 2.2; the discount is in their code alone. 0 where mask is false.
    """
    mask = mask.to(reward.dtype)
    total, earned = torch.zeros_like(reward[:, 0]), []
    for r in reward.mul(mask).flip(-1).unbind(-1):
        after, total = total, r + gamma * total
        earned.append(after if from_next else total)
    earned = torch.stack(earned, -1).flip(-1)  # [B, T]
    if length_norm:
        counted = mask.flip(-1).cumsum(-1).flip(-1) - (mask if from_next else 0)
        earned = earned / counted.clamp(min=1)
    return earned * mask


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with mean 0 and variance 1 over all positions of all ranks where mask is true, and 0 where it is not."""
    mask = mask.double()
    count = collectives.total(mask.sum()).clamp(min=1)
    mean = collectives.total((x * mask).sum()) / count
    variance = collectives.total(((x - mean).square() * mask).sum()) / count
    return ((x - mean) * (variance + 1e-8).rsqrt() * mask).to(x.dtype)


class Student(Rollout):
    def __init__(self, writers: Writers | None, share: float, **how):
        super().__init__(writers, **how)
        self.writes = share

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        return _data(batch) if self.writers.chance(step).random() >= self.writes else self.write(batch)

    def write(self, batch: Batch) -> Batch:
        return _only_who(self.writers.write(batch, "student", **self.how))


class Teacher(Rollout):
    writes = 1.0

    def write(self, batch: Batch) -> Batch:
        return self.writers.write(batch, "teacher", **self.how)


class Pairs(Rollout):
    writes = 1.0

    def write(self, batch: Batch) -> Batch:
        written = [self.writers.write(batch, name, **self.how) for name in ("teacher", "student")]
        return _joined([_only_who(part) for part in written])


FRESH = {  # which share of what the student wrote is to be new, by the progress of the run
    "decreasing": lambda progress: 1 - progress,
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
}


class Adaptive(Student):
    """Its state: the threshold, the loss that made it rise, and rows that the student wrote, the oldest first."""

    looks_first = True

    def __init__(self, writers: Writers | None, threshold: float, tolerance: float, capacity: int, replay: str, **how):
        super().__init__(writers, 1.0, **how)
        self.threshold, self.tolerance, self.capacity, self.fresh = threshold, tolerance, capacity, FRESH[replay]
        self.reference: float | None = None
        self.rows: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        chance = self.writers.chance(step)
        drawn, most = chance.random(), -(-self.capacity // collectives.count())
        if drawn >= self.threshold:
            return _data(batch)
        if drawn < self.threshold * self.fresh(progress) or collectives.any_of(len(self.rows.get("row", ())) < most):
            written = self.write(batch)
            new = as_rows(written)
            self.rows = {name: torch.cat([*self._held(name), x])[-most:] for name, x in new.items()}
            return written
        index = torch.from_numpy(chance.choice(most, len(batch.ids), replace=False))
        return _unpacked({name: x[index] for name, x in self.rows.items()}, batch)

    def _held(self, name: str) -> list[Tensor]:
        return [self.rows[name]] if self.rows else []

    def validated(self, loss: float) -> None:
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.tolerance:
            self.threshold, self.reference = min(1.0, self.threshold + RISE), loss

    def state(self) -> dict:
        return {"threshold": self.threshold, "reference": self.reference, "rows": self.rows}

    def is_own(self, state: dict) -> bool:
        return bool(state["rows"])

    def load(self, state: dict) -> None:
        self.threshold, self.reference, self.rows = state["threshold"], state["reference"], dict(state["rows"])


class Mixed(Rollout):
    """Its state: the batch that is being learned from, and which of the runs of `epochs` steps it is for."""

    def __init__(
        self, writers: Writers | None, how: dict, scale: float, clip: float | None, returned: dict, whiten: bool,
        epochs: int,
    ):  # fmt: skip
        super().__init__(writers, **how)
        self.scale, self.clip, self.returned = scale, clip, returned
        self.whiten, self.epochs, self.writes = whiten, epochs, 1 / epochs
        self.batch: Batch | None = None
        self.round = -1

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        if step // self.epochs != self.round:
            self.batch, self.round = self.write(batch), step // self.epochs
        return move_data_to_device(self.batch, batch.ids.device)  # a checkpoint is loaded to the CPU

    def write(self, batch: Batch) -> Batch:
        written = self.writers.write(batch, "student", "teacher", **self.how)
        info = _info(written)
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
        return given | {"token_info": _info(self.batch).to("cpu").provided(), "round": self.round}

    def load(self, state: dict) -> None:
        if state:
            given = {name: x for name, x in state.items() if name != "round"}
            self.batch = Batch(**given | {"token_info": TokenInfo(**state["token_info"])})
            self.round = state["round"]
        else:
            self.batch, self.round = None, -1


def _sampling(
    temperature: float, top_k: int | None, top_p: float, max_tokens: int | None, engine: str = "kd"
) -> dict:  # fmt: skip
    """What Writers.write is to be told, if it has a meaning."""
    check("rollout.temperature", temperature, 0 <= temperature < math.inf, "a number of at least 0, where 0 is greedy")
    check("rollout.top_k", top_k, top_k is None or top_k >= 1, "at least 1 token, or null for all")
    check("rollout.top_p", top_p, 0 < top_p <= 1, "a probability above 0 and at most 1")
    check("rollout.max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1 token, or null")
    check("rollout.engine", engine, engine in ("kd", "vllm"), "kd or vllm")
    if engine == "vllm":
        check_installed()
    return dict(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, engine=engine)


def _info(batch: Batch) -> TokenInfo:
    """Return the token information of text that a model wrote."""
    assert batch.token_info is not None, "a rollout gives token information"
    return batch.token_info


def _data(batch: Batch) -> Batch:
    """A batch that is as it was, among others that the student wrote."""
    return batch._replace(token_info=TokenInfo(by_student=torch.zeros(batch.labels.shape, device=batch.labels.device)))


def _only_who(batch: Batch) -> Batch:
    """Drop the token information that not every batch of a run has."""
    return batch._replace(token_info=TokenInfo(by_student=_info(batch).by_student))


def _joined(parts: list[Batch]) -> Batch:
    """Concatenate batches with the same fields of token information."""
    ids, labels, row, seed = (torch.cat(x) for x in zip(*(part[:4] for part in parts), strict=True))
    return Batch(ids, labels, row, seed, token_info=TokenInfo.concatenate([_info(part) for part in parts]))


def as_rows(batch: Batch) -> dict[str, Tensor]:
    """Rows that a model wrote, on the CPU: their tokens, and which of these are the response."""
    tokens = torch.cat([batch.ids, batch.labels[:, -1:].clamp(min=0)], -1)  # [B, T+1]
    prompt = generate.lengths(batch)
    span = torch.stack([prompt, prompt + (batch.labels != IGNORE).sum(-1)], -1)  # [B, 2]
    return {name: x.to("cpu", torch.int32) for name, x in dict(tokens=tokens, span=span, row=batch.row).items()}


def _unpacked(rows: dict[str, Tensor], batch: Batch) -> Batch:
    """The batch with these rows in place of its own."""
    tokens, span, row = (rows[name].to(batch.ids.device).long() for name in ("tokens", "span", "row"))
    place = torch.arange(1, tokens.shape[1], device=tokens.device)  # of the token that a label is
    counted = (place >= span[:, :1]) & (place < span[:, 1:])
    labels = tokens[:, 1:].masked_fill(~counted, IGNORE)
    ids = tokens[:, :-1].contiguous()
    return batch._replace(
        ids=ids, labels=labels, row=row, stored=None, token_info=TokenInfo(by_student=counted.float())
    )

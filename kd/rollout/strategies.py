"""On-policy methods: functions from samplers to a Rollout, by who writes the text that a student learns from.

rollout(batch, step, progress) -> Batch is called once per optimizer step, for the whole batch before it is cut into
micro-batches. The text depends only on the seed, the step, the weights and the rollout's state. So a resumed run writes
the same text as an undisturbed one. q is the student, p the teacher, r_t = log p(y_t) - log q(y_t).
"""

from __future__ import annotations

import math

from kd.errors import check
from kd.objective.token_info import provides
from kd.rollout import vllm
from kd.rollout.base import Rollout, traits
from kd.rollout.mixed import TeacherMixedSampling
from kd.rollout.replay import FRESH, AdaptiveReplay
from kd.rollout.sampled import StudentSampling, TeacherSampling, TeacherStudentPairs
from kd.rollout.samplers import Samplers


def none(samplers: Samplers | None) -> Rollout:
    """Text of the data, without sampling."""
    return Rollout(samplers)


@traits("writes_all", share=1)
@provides("by_student")
def student(
    samplers: Samplers | None, share: float = 0.5, temperature: float = 1.0, top_k: int | None = None,
    top_p: float = 1.0, max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """Responses of the student in a share of the batches, each as a whole; the other batches are data.

    On-policy distillation, GKD: Agarwal et al. 2023, arXiv 2306.13649, algorithm 1; share is lambda in the paper.
    share=1 with loss=rkl takes the reverse KL over the whole vocabulary. The on-policy distillation of Thinking
    Machines 2025 estimates it from the sampled token: type method=opd_token. Raises UserError for a share outside
    [0, 1], and like all functions here for values that generate.sample cannot take.
    """
    check("rollout.share", share, 0 <= share <= 1, "a share of the batches from 0 to 1")
    return StudentSampling(samplers, share, **_sampling_options(temperature, top_k, top_p, max_tokens, engine))


@traits("by_teacher")
def teacher(
    samplers: Samplers | None, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """Responses of the teacher in every batch: sequence-level distillation, SeqKD. Kim & Rush 2016, arXiv 1606.07947.

    The paper takes the teacher's best sequence by beam search; temperature=0 is the greedy one.
    """
    return TeacherSampling(samplers, **_sampling_options(temperature, top_k, top_p, max_tokens, engine))


@traits("writes_all")
@provides("by_student")
def pairs(
    samplers: Samplers | None, temperature: float = 0.8, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """Responses of teacher and student to every prompt. The batch has twice the rows, those of the teacher first.

    For loss=distillm2, Ko et al. 2025, arXiv 2503.07067. The paper samples responses once for each of a few rounds, not
    in each step.
    """
    return TeacherStudentPairs(samplers, **_sampling_options(temperature, top_k, top_p, max_tokens, engine))


@provides("by_student")
def adaptive(
    samplers: Samplers | None, threshold: float = 0.0, tolerance: float = 0.1, capacity: int = 1000,
    replay: str = "decreasing", temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None, engine: str = "kd",
) -> Rollout:  # fmt: skip
    """Responses of the student, new or replayed, with a probability that rises as validation gets worse; else data.

    The probability starts at `threshold`. It rises by 0.1 whenever the validation loss is at least `tolerance` nats
    above the last loss that raised it. The first such reference is the loss before the first step. A part of the
    probability is for new text: 1 - progress (replay=decreasing), 1/2 (constant) or progress (increasing). The rest is
    for rows from the last `capacity` that the student wrote, once there are so many. Adaptive student-generated output
    and replay of Ko et al. 2024 (DistiLLM), arXiv 2402.03898, sections 3.2 and 3.3, as in their code. Raises UserError
    for values without a meaning.
    """
    check("rollout.threshold", threshold, 0 <= threshold <= 1, "a chance from 0 to 1")
    check("rollout.tolerance", tolerance, tolerance >= 0, "a number of nats of at least 0")
    check("rollout.capacity", capacity, capacity >= 1, "at least 1 row, e.g. rollout.capacity=1000")
    check("rollout.replay", replay, replay in FRESH, f"one of {', '.join(FRESH)}")
    sampling = _sampling_options(temperature, top_k, top_p, max_tokens, engine)
    return AdaptiveReplay(samplers, threshold, tolerance, capacity, replay, **sampling)


@traits("writes_all")
@provides("student_logp", "teacher_logp", "importance", "advantage", "by_student")
def mixed(
    samplers: Samplers | None, teacher_share: float = 0.2, scale: float = 1.0, clip: float | None = None,
    gamma: float = 1.0, length_norm: bool = True, exclude_own_reward: bool = True, whiten: bool = False,
    epochs: int = 4, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    max_tokens: int | None = None,
) -> Rollout:  # fmt: skip
    """Responses whose tokens teacher and student draw together, with an advantage per position, for loss=minillm.

    Tokens are from teacher_share * p + (1 - teacher_share) * q. The advantage is the return (kd.rollout.mixed.returns)
    of rewards r_t / scale that are cut to [-clip, clip]; `whiten` gives it mean 0 and variance 1. Each batch is used
    for `epochs` steps, one after the other, with the prompts of the first.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, section 2.2. The defaults are the paper's; rollout=mixed_code has the
    values of the authors' code. This function differs from their code in four ways. There the plain text is learned
    from the teacher too, half and half. There whitening is over all positions of a mini-batch, padding included; here
    over the target positions of the whole step. There 256 rows are collected and used four times in mini-batches; here
    one batch is collected. There no 6 tokens may be written twice. Raises UserError for values without a meaning.
    """
    check("rollout.teacher_share", teacher_share, 0 <= teacher_share <= 1, "a share from 0 to 1")
    check("rollout.scale", scale, scale > 0, "a number above 0")
    check("rollout.clip", clip, clip is None or clip > 0, "a number above 0, or null")
    check("rollout.gamma", gamma, 0 <= gamma <= 1, "a discount from 0 to 1")
    check("rollout.epochs", epochs, epochs >= 1, "at least 1 step")
    sampling = dict(share=teacher_share, **_sampling_options(temperature, top_k, top_p, max_tokens))
    returned = dict(gamma=gamma, length_norm=length_norm, exclude_own_reward=exclude_own_reward)
    return TeacherMixedSampling(samplers, sampling, scale, clip, returned, whiten, epochs)


def _sampling_options(
    temperature: float, top_k: int | None, top_p: float, max_tokens: int | None, engine: str = "kd"
) -> dict:  # fmt: skip
    """Return the arguments of Samplers.write; raises UserError for values without a meaning."""
    check("rollout.temperature", temperature, 0 <= temperature < math.inf, "a number of at least 0, where 0 is greedy")
    check("rollout.top_k", top_k, top_k is None or top_k >= 1, "at least 1 token, or null for all")
    check("rollout.top_p", top_p, 0 < top_p <= 1, "a probability above 0 and at most 1")
    check("rollout.max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1 token, or null")
    check("rollout.engine", engine, engine in ("kd", "vllm"), "kd or vllm")
    if engine == "vllm":
        vllm.check_installed()
    return dict(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, engine=engine)

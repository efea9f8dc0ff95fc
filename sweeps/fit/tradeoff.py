"""Distillation against language modelling at equal compute, with and without what the teacher costs."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np

from sweeps import laws
from sweeps.answers import Answers
from sweeps.laws import Coefficients
from sweeps.points import Point


class Teacher(NamedTuple):
    """A teacher to choose: its loss, and what it costs."""

    label: str
    loss: float
    parameters: float | None
    tokens: float | None
    flops_per_token: float | None


def teachers(points: list[Point]) -> list[Teacher]:
    """Those of the sweep, the best first."""
    found: dict[str, list[Point]] = {}
    for p in points:
        if p.teacher is not None:
            found.setdefault(p.teacher, []).append(p)
    made = [
        Teacher(name, fmean(p.teacher_loss for p in of), of[0].teacher_parameters, of[0].teacher_tokens,
                of[0].teacher_flops_per_token) for name, of in found.items()
    ]  # fmt: skip
    return sorted(made, key=lambda t: t.loss)


class Scenario(NamedTuple):
    """What of the teacher counts to the cost of distillation. arXiv 2502.08606, section 5.2."""

    label: str
    inference: bool
    training: bool


SCENARIOS = (
    Scenario("the teacher is free", False, False),
    Scenario("its inference counts", True, False),
    Scenario("its training counts", False, True),
    Scenario("both count", True, True),
)


def student_tokens(compute, flops: float, teacher: Teacher, scenario: Scenario):
    """Tokens that a student can be distilled with for so many FLOPs; NaN where they do not even pay for the teacher.

    FLOPs = 3 F_S D_S + F_T (inference D_S + 3 training D_T), F a forward pass per token. arXiv 2502.08606, section 5.2.
    """
    if not known(teacher, scenario):
        return np.full_like(compute, np.nan)
    its = teacher.flops_per_token
    left = compute - (3 * its * teacher.tokens if scenario.training else 0)
    return np.where(left > 0, left, np.nan) / (3 * flops + (its if scenario.inference else 0))


def known(teacher: Teacher, scenario: Scenario) -> bool:
    """Whether what counts of the teacher's cost is known."""
    its = teacher.flops_per_token is not None
    return (its or not scenario.inference) and ((its and teacher.tokens is not None) or not scenario.training)


def gain(
    compute: np.ndarray, student: tuple[float, float], least: float, among: list[Teacher], scenario: Scenario,
    supervised: Coefficients, distillation: Coefficients,
) -> np.ndarray:  # fmt: skip
    """Loss of language modelling - that of distillation from the best of some teachers, at equal FLOPs [n].

    student: parameters and FLOPs per token. NaN where less than `least` tokens are left by any teacher.
    """
    size, flops = student
    alone = laws.supervised(supervised, size, compute / (3 * flops))
    taught = np.full_like(compute, np.inf)
    for teacher in among:
        tokens = student_tokens(compute, flops, teacher, scenario)
        tokens = np.where(tokens > 0.999 * least, tokens, np.nan)
        loss = laws.distilled(distillation, size, tokens, teacher.loss, laws.supervised(supervised, size, tokens))
        taught = np.fmin(taught, loss)
    return np.where(np.isfinite(taught), alone - taught, np.nan)


class Contest(NamedTuple):
    """Distillation against language modelling for one student and scenario, over FLOPs."""

    parameters: float
    scenario: Scenario
    compute: np.ndarray  # [n]
    gain: np.ndarray  # [n] nats, above 0 where distillation is better; NaN where it cannot be paid for
    low: np.ndarray  # [n] its 95% interval, from the bootstrap
    high: np.ndarray
    measured: float = np.inf  # the most FLOPs at which it was run both ways; beyond, the laws are extrapolated
    known: bool = True  # whether the cost of a teacher is

    def ranges(self, sure: bool) -> list[tuple[float, float]]:
        """FLOPs between which distillation wins, by the fit or by its whole interval."""
        wins = np.nan_to_num(self.low if sure else self.gain, nan=-1) > 0
        edges = np.flatnonzero(np.diff(np.concatenate([[False], wins, [False]]).astype(int)))
        return [(float(self.compute[a]), float(self.compute[b - 1])) for a, b in zip(edges[::2], edges[1::2])]

    def says(self, sure: bool = False) -> str:
        """Where distillation wins, and whether that was measured or is what the law says beyond.

        unknown where nothing tells: no teacher's cost, or for what is sure no bootstrap.
        """
        if not self.known or (sure and np.isnan(self.low).all() and not np.isnan(self.gain).all()):
            return "unknown"
        won = self.ranges(sure)
        words = [self.span(*range_) for range_ in won]
        if won and won[0][0] > self.measured:
            words.insert(0, f"nowhere as far as measured ({self.measured:.1e} FLOPs)")
        return " and ".join(words) or "nowhere"

    def span(self, low: float, high: float) -> str:
        """up to 1.2e+12 FLOPs, from … to …, or everywhere in the range shown; what no run tells is called so."""
        first, last = low == self.compute[0], high == self.compute[-1]
        if low > self.measured:
            return f"extrapolated from {low:.1e} FLOPs " + ("on" if last else f"to {high:.1e}")
        if high <= self.measured:
            return ("everywhere" if first and last else f"up to {high:.1e} FLOPs" if first else
                    f"from {low:.1e} FLOPs on" if last else f"from {low:.1e} to {high:.1e} FLOPs")  # fmt: skip
        start = "" if first else f"from {low:.1e} FLOPs "
        end = "everywhere beyond" if last else f"up to {high:.1e}"
        return f"{start}as far as measured ({self.measured:.1e} FLOPs), extrapolated {end}"


def reach(found: Answers, size: float, scenario: Scenario) -> float:
    """The most FLOPs at which a student was distilled, with what counts of its teacher, and was also trained alone."""
    alone = max((p.compute for p in found.alone if p.parameters == size), default=0.0)
    return min(alone, max((cost(p, scenario) for p in found.taught if p.parameters == size), default=0.0))


def cost(p: Point, scenario: Scenario) -> float:
    """FLOPs of a distilled run; 0 where what counts of its teacher is not known."""
    teacher = Teacher(p.teacher, p.teacher_loss, p.teacher_parameters, p.teacher_tokens, p.teacher_flops_per_token)
    if not known(teacher, scenario):
        return 0.0
    its = teacher.flops_per_token
    return p.compute + (its * p.tokens if scenario.inference else 0) + (
        3 * its * teacher.tokens if scenario.training else 0)  # fmt: skip


def contests(found: Answers) -> list[Contest]:
    """Who wins at equal FLOPs, for every student that was distilled and every scenario."""
    if not found.distillation:
        return []
    among, results = teachers(found.taught), []
    pairs = list(zip(found.supervised.samples, found.distillation.samples))
    paid = [3 * t.flops_per_token * t.tokens for t in among if t.flops_per_token and t.tokens]
    most = 3 * (max(p.compute for p in found.points) + min(paid, default=0))
    for student in sorted({(p.parameters, p.flops_per_token) for p in found.taught}):
        # The laws are not asked about less text than the student was ever given.
        least = min(p.tokens for p in found.points if p.parameters == student[0])
        compute = np.geomspace(3 * student[1] * least, most, 160)
        for scenario in SCENARIOS:
            at = partial(gain, compute, student, least, among, scenario)
            drawn = np.stack([at(*pair) for pair in pairs] or [np.full_like(compute, np.nan)])
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            line = at(found.supervised.coefficients, found.distillation.coefficients)
            told = any(known(teacher, scenario) for teacher in among)
            most_measured = reach(found, student[0], scenario)
            results.append(Contest(student[0], scenario, compute, line, low, high, most_measured, told))
    return results

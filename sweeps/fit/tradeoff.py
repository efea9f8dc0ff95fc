"""Distillation against language modelling at equal compute, with and without the cost of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np

from sweeps.fit import laws
from sweeps.fit.fits import ScalingFits
from sweeps.fit.laws import Coefficients, Samples
from sweeps.fit.observations import Observation

GRID = 160  # amounts of compute that are compared


@dataclass(frozen=True)
class TeacherCost:
    """Teacher with its loss and cost."""

    label: str
    loss: float
    parameters: float | None
    tokens: float | None  # that it was trained on
    flops_per_token: float | None  # of a forward pass

    @property
    def training(self) -> float:
        """FLOPs of the teacher's training. Its training tokens have to be known."""
        assert self.tokens is not None, f"the tokens of teacher {self.label} are not known"
        return 3 * self.inference * self.tokens

    @property
    def inference(self) -> float:
        """FLOPs of the teacher's forward pass per token. Its cost has to be known."""
        assert self.flops_per_token is not None, f"the cost of teacher {self.label} is not known"
        return self.flops_per_token


@dataclass(frozen=True)
class Scenario:
    """Parts of the teacher's cost that are added to the cost of distillation. arXiv 2502.08606, section 5.2."""

    label: str
    inference: bool
    training: bool

    def knows(self, teacher: TeacherCost) -> bool:
        """Return True if a teacher's cost is known in the parts that this scenario adds."""
        flops = teacher.flops_per_token is not None
        return (flops or not self.inference) and ((flops and teacher.tokens is not None) or not self.training)


SCENARIOS = (
    Scenario("the teacher is free", False, False),
    Scenario("its inference counts", True, False),
    Scenario("its training counts", False, True),
    Scenario("both count", True, True),
)


@dataclass(frozen=True)
class ComputeTradeoff:
    """Distillation against language modelling for one student and scenario, over FLOPs."""

    parameters: float
    scenario: Scenario
    compute: np.ndarray  # [n]
    loss_reduction: np.ndarray  # [n] nats, above 0 where distillation is better; NaN where it cannot be paid for
    low: np.ndarray  # [n] its 95% interval, from the bootstrap
    high: np.ndarray
    measured_up_to: float = np.inf  # most FLOPs at which it was run both ways; beyond, the laws are extrapolated
    has_known_cost: bool = True  # of at least one teacher

    def ranges(self, beyond_noise: bool = False) -> list[tuple[float, float]]:
        """Return the FLOPs between which distillation wins, by the fit or by its whole interval."""
        wins = np.nan_to_num(self.low if beyond_noise else self.loss_reduction, nan=-1) > 0
        edges = np.flatnonzero(np.diff(np.concatenate([[False], wins, [False]]).astype(int)))
        return [(float(self.compute[a]), float(self.compute[b - 1])) for a, b in zip(edges[::2], edges[1::2])]

    def ranges_text(self, beyond_noise: bool = False) -> str:
        """Return the ranges as text, with † beyond the measured compute; unknown without cost or bootstrap."""
        unsure = beyond_noise and np.isnan(self.low).all() and not np.isnan(self.loss_reduction).all()
        if not self.has_known_cost or unsure:
            return "unknown"
        ranges = self.ranges(beyond_noise)
        return ", ".join(f"{a:.1e}–{b:.1e}{' †' * (b > self.measured_up_to)}" for a, b in ranges) or "nowhere"


def teachers_of(runs: list[Observation]) -> list[TeacherCost]:
    """Return the teachers of distilled runs, the best first."""
    by_label: dict[str, list[Observation]] = {}
    for run in runs:
        if run.teacher is not None:
            by_label.setdefault(run.teacher, []).append(run)
    teachers = []
    for label, some in by_label.items():
        loss, first = fmean(run.teacher_loss for run in some if run.teacher_loss is not None), some[0]
        size, flops = first.teacher_parameters, first.teacher_flops_per_token
        teachers.append(TeacherCost(label, loss, size, first.teacher_tokens, flops))
    return sorted(teachers, key=lambda teacher: teacher.loss)


def student_tokens(compute, flops: float, teacher: TeacherCost, scenario: Scenario):
    """Return the tokens that distillation of a student gets for these FLOPs; NaN if the teacher alone costs more.

    FLOPs = 3 F_S D_S + F_T (inference D_S + 3 training D_T), F a forward pass per token. arXiv 2502.08606, section 5.2.
    """
    if not scenario.knows(teacher):
        return np.full_like(compute, np.nan)
    remaining = compute - (teacher.training if scenario.training else 0)
    per_token = 3 * flops + (teacher.inference if scenario.inference else 0)
    return np.where(remaining > 0, remaining, np.nan) / per_token


def loss_reduction(
    compute: np.ndarray, student: tuple[float, float], least: float, teachers: list[TeacherCost], scenario: Scenario,
    supervised: Coefficients | Samples, distillation: Coefficients | Samples,
) -> np.ndarray:  # fmt: skip
    """Return the loss of language modelling - that of distillation from the best teacher, at equal FLOPs [n].

    The result is [B, n] with the coefficients of B resamples.

    student: parameters and FLOPs per token. NaN where any teacher leaves less than `least` tokens.
    """
    size, flops = student
    baseline = laws.supervised(supervised, size, compute / (3 * flops))
    distilled = np.full_like(baseline, np.inf)
    for teacher in teachers:
        tokens = student_tokens(compute, flops, teacher, scenario)
        tokens = np.where(tokens > 0.999 * least, tokens, np.nan)
        loss = laws.distilled(distillation, size, tokens, teacher.loss, laws.supervised(supervised, size, tokens))
        distilled = np.fmin(distilled, loss)
    return np.where(np.isfinite(distilled), baseline - distilled, np.nan)


def measured_up_to(fits: ScalingFits, size: float, scenario: Scenario) -> float:
    """Return the most FLOPs at which a student was distilled, its teacher's cost included, and trained alone."""
    supervised = max((run.compute for run in fits.supervised_runs if run.parameters == size), default=0.0)
    distilled = (distillation_cost(run, scenario) for run in fits.distilled_runs if run.parameters == size)
    return min(supervised, max(distilled, default=0.0))


def distillation_cost(run: Observation, scenario: Scenario) -> float:
    """Return the FLOPs of a distilled run; 0 if a part of its teacher's cost is not known."""
    (teacher,) = teachers_of([run])
    if not scenario.knows(teacher):
        return 0.0
    inference = teacher.inference * run.tokens if scenario.inference else 0
    return run.compute + inference + (teacher.training if scenario.training else 0)


def tradeoffs_of(fits: ScalingFits) -> list[ComputeTradeoff]:
    """Return the tradeoff of every student that was distilled, in every scenario."""
    if not fits.supervised or not fits.distillation:
        return []
    teachers, tradeoffs = teachers_of(fits.distilled_runs), []
    bootstraps = (fits.supervised.bootstrap, fits.distillation.bootstrap)
    samples = [laws.stacked_samples(bootstrap) for bootstrap in bootstraps if bootstrap]
    trainings = [t.training for t in teachers if t.flops_per_token and t.tokens]
    most = 3 * (max(run.compute for run in fits.runs) + min(trainings, default=0))
    for student in sorted({(run.parameters, run.forward_flops) for run in fits.distilled_runs}):
        # The laws are not evaluated below the fewest tokens that the student was trained on.
        least = min(run.tokens for run in fits.runs if run.parameters == student[0])
        compute = np.geomspace(3 * student[1] * least, most, GRID)
        for scenario in SCENARIOS:
            reduction = partial(loss_reduction, compute, student, least, teachers, scenario)
            drawn = reduction(*samples) if samples else np.full((1, GRID), np.nan)
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            tradeoffs.append(
                ComputeTradeoff(
                    parameters=student[0],
                    scenario=scenario,
                    compute=compute,
                    loss_reduction=reduction(fits.supervised.coefficients, fits.distillation.coefficients),
                    low=low,
                    high=high,
                    measured_up_to=measured_up_to(fits, student[0], scenario),
                    has_known_cost=any(scenario.knows(teacher) for teacher in teachers),
                )
            )
    return tradeoffs

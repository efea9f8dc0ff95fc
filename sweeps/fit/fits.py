"""Fitted laws: coefficients with their intervals, and those that the runs do not determine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kd.system.console import counted
from sweeps.fit.laws import DISTILLATION, POWER, PUBLISHED, SUPERVISED, Coefficients, Law
from sweeps.fit.observations import Observation, setting_numbers
from sweeps.fit.solver import LackOfFit, accepted_share
from sweeps.report.wording import join_words

AT_BOUND = 1.01  # as a factor: this near to an end of the search, a coefficient is at it
UNDETERMINED = 10.0  # a coefficient whose interval ends are further apart than this factor is undetermined
ACCEPTED = 0.9  # share of draws: where more are drawn again, intervals are noticeably too narrow
FEWEST_VALUES = 3  # of an axis, for an exponent over it


@dataclass
class Fit:
    """Law with its coefficients and their intervals."""

    law: Law
    subset: str  # of the runs, in words; empty for all of a kind
    runs: list[Observation]
    coefficients: Coefficients
    bootstrap: list[Coefficients]  # from settings drawn with replacement
    converged: bool  # all searches, but those of resamples: of all runs, without the held-out runs, by least squares
    unconverged: int  # resamples whose search ended before it converged; `bootstrap` has them too
    held_out: np.ndarray  # mask of the runs that `fit_coefficients` leaves out [n]
    fit_coefficients: Coefficients | None  # from the other runs; None if too few would remain
    errors: np.ndarray  # log predicted - log measured, of held-out runs by `fit_coefficients`, else `coefficients` [n]
    loglinear_error: float | None  # mean relative error on held-out runs of a law that is linear in logarithms
    lack_of_fit: LackOfFit | None  # if seeds repeat
    settings: int  # different inputs of the law; further runs repeat one with another seed
    bounds: dict[str, tuple[float, float]]  # of the search, in the units of the law; not those of A, B and C

    @property
    def title(self) -> str:
        return self.law.name + (f" law ({self.subset})" if self.subset else " law")

    @property
    def published(self) -> Coefficients:
        return PUBLISHED.get(self.law.name, {})

    @property
    def held_out_error(self) -> float | None:
        """Mean of |predicted / measured - 1| over held-out runs."""
        return float(np.abs(np.expm1(self.errors[self.held_out])).mean()) if self.held_out.any() else None

    @property
    def held_out_text(self) -> str:
        """Error on held-out runs, beside that of the plainest law; empty without held-out runs."""
        if self.held_out_error is None:
            return ""
        off = f"off on the {self.held_out.sum()} largest runs, held out, by {self.held_out_error:.2%}"
        return f"{off} (straight line in logarithms: {self.loglinear_error:.2%})"

    @property
    def lack_of_fit_text(self) -> str:
        """Result of the test for lack of fit; empty if no setting has several seeds."""
        test = self.lack_of_fit
        if test is None:
            return ""
        result = "holds within" if test.within_noise else "misses the means of settings by more than"
        p = "p < 0.0001" if test.p < 1e-4 else f"p = {test.p:.2g}"
        numbers = f"F({', '.join(map(str, test.freedom))}) = {test.f:.2g}, {p}"
        return f"{result} the noise of seeds (lack of fit: {numbers})"

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95% interval of a coefficient, from the bootstrap."""
        values = [sample[name] for sample in self.bootstrap]
        if not values:
            return None
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    def bound_mark(self, name: str, value: float) -> str:
        """Return ≤ or ≥ if a value is within 1% of an end of the search, so that the true value may be beyond."""
        low, high = self.bounds.get(name, (0.0, math.inf))
        return "≤ " if value <= low * AT_BOUND else "≥ " if value >= high / AT_BOUND else ""

    def value_text(self, name: str) -> str:
        value = self.coefficients[name]
        return f"{self.bound_mark(name, value)}{value:.4g}"

    def interval_text(self, name: str) -> str:
        ends = self.interval(name)
        return " to ".join(f"{self.bound_mark(name, end)}{end:.4g}" for end in ends) if ends else "–"

    @property
    def at_bounds(self) -> list[str]:
        """Coefficients whose value is an end of the search."""
        return [name for name, value in self.coefficients.items() if self.bound_mark(name, value)]

    @property
    def too_few_values(self) -> dict[str, str]:
        """Coefficients of an axis with fewer values than an exponent needs, with the number of values."""
        if self.law is POWER:
            return {}
        axes = {"parameters": ("student sizes", "A alpha"), "tokens": ("numbers of tokens", "B beta"),
                "teacher_loss": ("teachers", "c0 c1 f1 d1")}  # fmt: skip
        few: dict[str, str] = {}
        for axis, (noun, names) in axes.items():
            count = len({getattr(run, axis) for run in self.runs})
            if count < FEWEST_VALUES and (axis != "teacher_loss" or self.law is DISTILLATION):
                rest = ["E"] if self.law is SUPERVISED else []  # of a loss without that term
                few |= {name: f"{count} {noun}" for name in [*names.split(), *rest] if name not in few}
        return few

    @property
    def undetermined(self) -> list[str]:
        """Coefficients at a bound, with too few values, or with an interval that is wide or ends at a bound."""
        ends = {name: interval for name in self.law.names if (interval := self.interval(name))}
        wide = [name for name, (low, high) in ends.items() if high > low * UNDETERMINED
                or self.bound_mark(name, low) or self.bound_mark(name, high)]  # fmt: skip
        loose = {*wide, *self.at_bounds, *self.too_few_values}
        return [name for name in self.law.names if name in loose]

    @property
    def limits(self) -> list[str]:
        """Warnings of too few values or settings for this law, independent of the intervals."""
        lines = [
            f"The {self.title} is fitted to {few}: an exponent needs at least {FEWEST_VALUES}."
            if "teachers" not in few
            else f"{few}: c0, c1, f1 and d1, which are about them, need at least {FEWEST_VALUES}."
            for few in dict.fromkeys(self.too_few_values.values())
        ]
        if self.settings < 2 * len(self.law.names):
            repeats = f", of {counted(len(self.runs), 'run', 'runs')}," if len(self.runs) > self.settings else ""
            lines.append(
                f"{counted(self.settings, 'setting', 'settings')}{repeats} {'is' if self.settings == 1 else 'are'} few "
                f"for the {len(self.law.names)} coefficients of the {self.title}."
            )
        return lines

    @property
    def narrow_intervals(self) -> list[str]:
        """Warning of intervals that are too narrow, as draws with few distinct settings were drawn again."""
        settings, least = len(np.unique(setting_numbers(self.runs))), len(self.law.names)
        accepted = accepted_share(settings, least)
        if not self.bootstrap or accepted >= ACCEPTED:
            return []
        return [
            f"The intervals of the {self.title} are too narrow. Only {accepted:.0%} of draws from the {settings} "
            f"settings have the {least} distinct ones that the fit needs, and the other draws were repeated."
        ]

    @property
    def better_than_teacher(self) -> int:
        """Number of students with a loss below their teacher's."""
        return sum(run.teacher_loss is not None and run.loss < run.teacher_loss for run in self.runs)

    @property
    def warnings(self) -> list[str]:
        """Warnings about coefficients that the runs do not determine."""
        lines = self.limits
        if self.law is DISTILLATION and (better := self.better_than_teacher):
            lines.append(
                f"{counted(better, 'student is better than its', 'students are better than their')} teacher, "
                f"which the {self.title} does not allow for."
            )
        if wide := [k for k in self.undetermined if k not in self.at_bounds and k not in self.too_few_values]:
            lines.append(
                f"{join_words(wide)} of the {self.title} cannot be told from these runs: the interval spans more than "
                f"a factor of {UNDETERMINED:g} or ends where the search did. What the law predicts within the range of "
                "the runs may still hold."
            )
        if self.at_bounds:
            lines.append(
                f"{join_words(self.at_bounds)} of the {self.title} ran to the end of the search: these runs do not "
                "tell it."
            )
        if not self.converged:
            lines.append(
                f"A search for the {self.title} did not converge: to all runs, without the held-out runs, or by least "
                "squares for the lack of fit. A better fit may exist."
            )
        if self.unconverged:
            lines.append(
                f"The search did not converge for {self.unconverged:,} of {len(self.bootstrap):,} resamples of the "
                f"{self.title}. The intervals include them."
            )
        lines += self.narrow_intervals
        if not self.held_out.any():
            lines.append(f"No run was held out from the {self.title}: too few would be left to fit it.")
        return lines


@dataclass
class ScalingFits:
    """All laws that a set of runs allows, and the reasons why other laws cannot be fitted."""

    name: str
    runs: list[Observation]
    notes: list[str]
    supervised: Fit | None = None
    distillation: Fit | None = None
    powers: dict[str, Fit] = field(default_factory=dict)  # by axis
    not_fitted: list[str] = field(default_factory=list)  # reasons

    @property
    def main(self) -> list[Fit]:
        """Laws of N and D."""
        return [fit for fit in (self.supervised, self.distillation) if fit]

    @property
    def fits(self) -> list[Fit]:
        return [*self.main, *self.powers.values()]

    @property
    def entropy(self) -> float | None:
        """Entropy of the data, if it is known and the same for all runs."""
        values = {run.entropy for run in self.runs}
        return values.pop() if len(values) == 1 else None

    @property
    def supervised_runs(self) -> list[Observation]:
        return [run for run in self.runs if run.teacher is None]

    @property
    def distilled_runs(self) -> list[Observation]:
        return [run for run in self.runs if run.teacher is not None]

"""The laws fitted to points: coefficients, how sure they are, and what cannot be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kd.progress import console, counted, track
from sweeps import laws
from sweeps.compare import amount, listed
from sweeps.laws import DISTILLATION, POWER, SUPERVISED, Coefficients, LackOfFit, Law, Problem
from sweeps.points import Point, column, data, numbered, settings_of

BESIDE = 1.01  # as a factor: this near to an end of what was searched, a coefficient is at it


@dataclass
class Fit:
    """A law with its coefficients, and how sure they are."""

    law: Law
    of: str  # which runs
    points: list[Point]
    coefficients: Coefficients
    samples: list[Coefficients]  # from settings drawn with replacement
    held: np.ndarray  # which runs `part` was fitted without [n]
    part: Coefficients | None  # from the others; None where too few would be left
    errors: np.ndarray  # log predicted - log measured, of held-out runs by `part`, of others by `coefficients` [n]
    straight: float | None  # the error on held-out runs of a law that is linear in logarithms
    lack: LackOfFit | None  # where seeds repeat
    settings: int  # different inputs of the law; further runs repeat one with another seed
    bounds: dict[str, tuple[float, float]]  # of what was searched, in the units of the law; not of A, B and C
    doubts: list[str] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """Mean of |predicted / measured - 1| over held-out runs."""
        return float(np.abs(np.expm1(self.errors[self.held])).mean()) if self.held.any() else None

    @property
    def beside(self) -> str:
        """The error on held-out runs, beside that of the plainest law."""
        return f"{self.error:.2%}, where a straight line in logarithms is off by {self.straight:.2%}"

    @property
    def holds(self) -> str:
        """Whether it holds within the noise of seeds; empty where no setting has several."""
        if self.lack is None:
            return ""
        held = "holds within" if self.lack.noise else "misses the means of settings by more than"
        return f"{held} the noise of seeds"

    @property
    def test(self) -> str:
        """The same with the numbers of the test."""
        if self.lack is None:
            return ""
        size = "p < 0.0001" if self.lack.p < 1e-4 else f"p = {self.lack.p:.2g}"
        return f"{self.holds} (lack of fit: F({', '.join(map(str, self.lack.freedom))}) = {self.lack.f:.2g}, {size})"

    def interval(self, name: str) -> tuple[float, float] | None:
        """95%, from the bootstrap."""
        values = [sample[name] for sample in self.samples]
        return tuple(float(x) for x in np.quantile(values, [0.025, 0.975])) if values else None

    def at(self, name: str, value: float) -> str:
        """≤ or ≥ where a value lies at an end of what was searched, within 1%: the truth may lie beyond."""
        low, high = self.bounds.get(name, (0.0, math.inf))
        return "≤ " if value <= low * BESIDE else "≥ " if value >= high / BESIDE else ""

    def says(self, name: str) -> str:
        """The value, as far as it is one."""
        value = self.coefficients[name]
        return f"{self.at(name, value)}{value:.4g}"

    def spans(self, name: str) -> str:
        """The 95% interval, as far as it has ends."""
        ends = self.interval(name)
        return " to ".join(f"{self.at(name, end)}{end:.4g}" for end in ends) if ends else "–"

    @property
    def stuck(self) -> list[str]:
        """Coefficients whose value is an end of what was searched."""
        return [name for name, value in self.coefficients.items() if self.at(name, value)]

    @property
    def thin(self) -> dict[str, str]:
        """Coefficients about an axis that has fewer than the 3 values that an exponent needs, and what there are."""
        if self.law is POWER:
            return {}
        axes = {"parameters": ("student sizes", "A alpha"), "tokens": ("numbers of tokens", "B beta"),
                "teacher_loss": ("teachers", "c0 c1 f1 d1")}  # fmt: skip
        found = {}
        for axis, (what, names) in axes.items():
            count = len({getattr(p, axis) for p in self.points})
            if count < 3 and (axis != "teacher_loss" or self.law is DISTILLATION):
                names = names.split() + (["E"] if self.law is SUPERVISED else [])  # what is left where no term is
                found |= {name: f"{count} {what}" for name in names if name not in found}
        return found

    @property
    def limits(self) -> list[str]:
        """What there is too little of for this law, whatever the intervals say."""
        of = self.law.name + (f" law ({self.of})" if self.of else " law")
        found = [
            f"The {of} is fitted to {few}: an exponent needs at least 3."
            if "teachers" not in few
            else f"{few}: c0, c1, f1 and d1, which are about them, need at least 3."
            for few in dict.fromkeys(self.thin.values())
        ]
        if self.settings < 2 * len(self.law.names):
            repeats = f", of {counted(len(self.points), 'run', 'runs')}," if len(self.points) > self.settings else ""
            found.append(
                f"{counted(self.settings, 'setting', 'settings')}{repeats} {'is' if self.settings == 1 else 'are'} few "
                f"for the {len(self.law.names)} coefficients of the {of}."
            )
        return found

    @property
    def loose(self) -> list[str]:
        """Coefficients that the runs do not tell: stuck, thin, or of an interval that is wide or has no end."""
        ends = {name: self.interval(name) for name in self.law.names} if self.samples else {}
        wide = [k for k, (low, high) in ends.items() if high > low * laws.LOOSE or self.at(k, low) or self.at(k, high)]
        return [name for name in self.law.names if name in wide or name in self.stuck or name in self.thin]


def fitted(
    law: Law, of: str, points: list[Point], draws: int, seed: int, alone: Fit | None = None, axis: str = "parameters"
) -> Fit:
    """Fit a law to runs, once to all, once without the largest, and to `draws` resamples.

    alone: the supervised law, for the distillation law. axis: what a power law is over.
    """
    console.print(
        f"fitting the {law.name} law{of and f' {of}'} to {counted(len(points), 'run', 'runs')}", soft_wrap=True
    )
    every, settings, seeds = data(points), settings_of(points), numbered(p.seed for p in points)
    if law is POWER:
        every = every._replace(n=column(points, axis))

    def problem(rows, c: Coefficients | None) -> Problem:
        some = every[rows]
        return Problem(law, some, laws.supervised(c, some.n, some.d) if alone else None)

    def predict(c: Coefficients, base: Coefficients | None) -> np.ndarray:
        if law is POWER:
            return laws.power(c, every.n)
        own = laws.supervised(base or c, every.n, every.d)
        return laws.distilled(c, every.n, every.d, every.teacher_loss, own) if alone else own

    whole = problem(slice(None), alone and alone.coefficients)
    misfits = whole.misfits()
    optima = whole.optima(misfits)
    best = whole.coefficients(optima[0])
    errors = np.log(predict(best, alone and alone.coefficients)) - np.log(every.loss)
    held = laws.held_out(column(points, "compute"), settings, len(law.names) + 1)
    part = None
    if held.any():
        base = alone and (alone.part or alone.coefficients)
        rest = problem(~held, base)
        part = rest.coefficients(rest.optima(rest.misfits())[0])
        errors[held] = (np.log(predict(part, base)) - np.log(every.loss))[held]
    rng, samples = np.random.default_rng(seed), []
    for draw in track(range(draws), f"bootstrap of the {law.name} law{of and f' {of}'}"):
        again = problem(slice(None), alone.samples[draw]) if alone else whole
        # From the grid too: else a draw hardly leaves the valley that the whole ended in, and intervals are too narrow.
        found = again.optima(misfits, laws.resampled(settings, rng), optima[:2], tries=4)
        samples.append(again.coefficients(found[0]))
    lines = [every.n] if law is POWER else [every.n, every.d, *([every.teacher_loss] if alone else [])]
    off = laws.straight(np.log(lines), np.log(every.loss), ~held) - np.log(every.loss)
    plain = float(np.abs(np.expm1(off[held])).mean()) if held.any() else None
    _, least = whole.solve(optima[0], np.full(len(points), 1 / len(points)), delta=1.0)  # least squares
    residuals = law.log(least, whole.inputs)[0] - whole.loss
    lack = laws.lack_of_fit(residuals, settings, seeds, len(law.names))
    # A, B and C are searched in other units, which depend on the exponents, and far from their bounds.
    bounds = {k: tuple(np.exp(ends).tolist()) for k, ends in zip(law.names, whole.bounds) if k not in "ABC"}
    count = len(np.unique(every.n if law is POWER else settings))
    fit = Fit(law, of, points, best, samples, held, part, errors, plain, lack, count, bounds)
    fit.doubts = doubts(fit)
    return fit


def doubts(fit: Fit) -> list[str]:
    """What the runs cannot tell of the coefficients."""
    of, found = fit.law.name + (f" law ({fit.of})" if fit.of else " law"), fit.limits
    if fit.law is DISTILLATION and (better := sum(p.loss < p.teacher_loss for p in fit.points)):
        found.append(
            f"{counted(better, 'student is better than its', 'students are better than their')} teacher, "
            f"which the {of} does not allow for."
        )
    if loose := [k for k in fit.loose if k not in fit.stuck and k not in fit.thin]:
        found.append(
            f"{listed(loose)} of the {of} cannot be told from these runs: the interval spans more than a factor of "
            f"{laws.LOOSE:g} or ends where the search did. What the law predicts within the range of the runs may "
            "still hold."
        )
    if fit.stuck:
        found.append(f"{listed(fit.stuck)} of the {of} ran to the end of what was searched: these runs do not tell it.")
    if not fit.held.any():
        found.append(f"No run was held out from the {of}: too few would be left to fit it.")
    return found


@dataclass
class Answers:
    """All that was fitted to a set of points, and what could not be."""

    name: str
    points: list[Point]
    notes: list[str]
    supervised: Fit | None = None
    distillation: Fit | None = None
    powers: dict[str, Fit] = field(default_factory=dict)  # by axis
    cannot: list[str] = field(default_factory=list)

    @property
    def fits(self) -> list[Fit]:
        return [f for f in (self.supervised, self.distillation, *self.powers.values()) if f]

    @property
    def entropy(self) -> float | None:
        """Of the data, where it is known and one."""
        found = {p.entropy for p in self.points}
        return found.pop() if len(found) == 1 else None

    @property
    def alone(self) -> list[Point]:
        return [p for p in self.points if p.teacher is None]

    @property
    def taught(self) -> list[Point]:
        return [p for p in self.points if p.teacher is not None]


def lacks(points: list[Point], law: Law) -> str:
    """Why a law of N and D cannot be fitted to these runs; empty if it can."""
    sizes, amounts = (len(np.unique(column(points, k))) for k in ("parameters", "tokens"))
    settings = len(np.unique(settings_of(points)))
    if settings > len(law.names) and sizes > 1 and amounts > 1:
        return ""
    return (
        f"{len(law.names)} coefficients need at least {len(law.names) + 1} settings of at least 2 student sizes and 2 "
        f"numbers of tokens; here: {counted(settings, 'setting', 'settings')} in "
        f"{counted(len(points), 'run', 'runs')}, {counted(sizes, 'size', 'sizes')} and "
        f"{counted(amounts, 'number', 'numbers')} of tokens"
    )


def answers(name: str, points: list[Point], notes: list[str], draws: int, seed: int) -> Answers:
    """Fit all that these points allow."""
    found = Answers(name, points, list(notes))
    alone, taught = found.alone, found.taught
    if why := lacks(alone, SUPERVISED):
        found.cannot.append(f"The supervised law cannot be fitted to the runs by language modelling alone: {why}.")
    else:
        found.supervised = fitted(SUPERVISED, "", alone, draws, seed)
    if not taught:
        found.cannot.append("The distillation law cannot be fitted: no run learns from a teacher.")
    elif found.supervised is None:
        found.cannot.append("The distillation law cannot be fitted, since it is built on the supervised law.")
    elif why := lacks(taught, DISTILLATION):
        found.cannot.append(f"The distillation law cannot be fitted: {why}.")
    elif len({p.teacher_loss for p in taught}) < 2:
        found.cannot.append("The distillation law cannot be fitted: it needs at least 2 teachers of different losses.")
    else:
        found.distillation = fitted(DISTILLATION, "", taught, draws, seed, found.supervised)
    for axis, (of, some) in lines(alone).items():
        if len(np.unique(column(some, axis))) < 4:
            found.cannot.append(f"A power law over {axis} needs at least 4 values of it{of and f' for {of}'}.")
        else:
            found.powers[axis] = fitted(POWER, f"over {axis}{of and f', {of}'}", some, draws, seed, axis=axis)
    return found


def lines(points: list[Point]) -> dict[str, tuple[str, list[Point]]]:
    """Runs along one axis: of the largest student, with most tokens, and those that no cheaper run is better than."""
    if not points:
        return {}
    size, most = max(p.parameters for p in points), max(p.tokens for p in points)
    front = [p for p in points if not any(q.loss < p.loss and q.compute <= p.compute for q in points)]
    return {
        "tokens": (f"N = {amount(size)}", [p for p in points if p.parameters == size]),
        "parameters": (f"D = {amount(most)}", [p for p in points if p.tokens == most]),
        "compute": ("the best runs", front),
    }


def published(fit: Fit) -> Coefficients:
    return laws.PUBLISHED.get(fit.law.name, {})

"""Scaling fits as one page of HTML that needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from sweeps.fit.fits import Fit, ScalingFits
from sweeps.fit.observations import Observation
from sweeps.fit.plots import BestSize, agreement_plot, isoflop_plot, power_plot
from sweeps.fit.tradeoff import SCENARIOS, teachers_of, tradeoffs_of
from sweeps.fit.tradeoff_plots import students_plot, tradeoff_plot
from sweeps.report.html_page import render
from sweeps.report.wording import format_amount

MEANINGS = {
    "E": "loss that neither more parameters nor more text would take away, nats per token",
    "A": "what a lack of parameters costs, at one parameter", "B": "what a lack of text costs, at one token",
    "C": "what a lack costs, at 1 on the axis", "alpha": "how fast more parameters help",
    "beta": "how fast more text helps", "gamma": "exponent of both together", "kappa": "how fast more helps",
    "c0": "how the student's distance to its teacher depends on the teacher's loss",
    "d1": "teacher's loss, over that of the student alone, at which the gap in capacity opens",
    "c1": "how strong the gap is", "f1": "how gradually it opens",
}  # fmt: skip


def facts(fits: ScalingFits) -> dict[str, str]:
    """Return runs, ranges of N and D, compute and teachers."""
    entries = {
        "runs": f"{len(fits.supervised_runs)} by language modelling, {len(fits.distilled_runs)} with a teacher",
        "N": span("parameters", fits.runs), "D": span("tokens", fits.runs),
        "training FLOPs": f"{sum(run.compute for run in fits.runs):.2e} of all students",
    }  # fmt: skip
    if fits.distilled_runs:
        entries["teachers"] = ", ".join(f"{t.label} ({t.loss:.3f})" for t in teachers_of(fits.distilled_runs))
    return entries


def span(name: str, runs: Iterable[Observation]) -> str:
    values = sorted({getattr(run, name) for run in runs})
    return f"{format_amount(values[0])} to {format_amount(values[-1])} ({len(values)})"


def predicted(fit: Fit) -> list[float]:
    """Return the predicted losses of a fit's runs."""
    return [run.loss * math.exp(error) for run, error in zip(fit.runs, fit.errors)]


def fit_page(fits: ScalingFits, verdict: str, question: str = "") -> str:
    """Return the fits as HTML."""
    tradeoffs, figures = tradeoffs_of(fits), {}
    best_sizes: list[BestSize] = []
    if fits.main:
        figures["agreement"] = agreement_plot(fits.main)
    if fits.supervised:
        figures["isoflop"], best_sizes = isoflop_plot(fits.supervised)
    if fits.distillation:
        figures["students"], figures["winners"] = students_plot(fits), tradeoff_plot(fits, tradeoffs)
    figures |= {f"power-{axis}": power_plot(axis, fit, fits.entropy) for axis, fit in fits.powers.items()}
    warnings = [*fits.not_fitted, *(line for fit in fits.fits for line in fit.warnings), *fits.notes]
    return render(
        "fit.html", figures, folder=Path(__file__).parent / "templates", question=question, verdict=verdict,
        facts=facts(fits), warnings=warnings, fits=fits, best_sizes=best_sizes, tradeoffs=tradeoffs,
        scenarios=SCENARIOS, meanings=MEANINGS, amount=format_amount, predicted=predicted,
    )  # fmt: skip

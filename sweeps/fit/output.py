"""Scaling fits as files and in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from kd.system import files
from kd.system.console import Terminal, counted, styled
from sweeps.fit.fits import Fit, ScalingFits
from sweeps.fit.observations import to_csv
from sweeps.fit.page import fit_page
from sweeps.fit.tradeoff import tradeoffs_of


def write_fits(folder: Path, fits: ScalingFits, verdict: str, question: str = "") -> list[Path]:
    """Write the page, the numbers and the runs; return their paths, the page first."""
    page, numbers, runs = (folder / f"{fits.name}.{end}" for end in ("fit.html", "fit.json", "points.csv"))
    to_csv(runs, fits.runs)
    files.write_json(numbers, as_json(fits))
    with files.atomic(page) as temporary:
        temporary.write_text(fit_page(fits, verdict, question), encoding="utf-8")
    return [page, numbers, runs]


def as_json(fits: ScalingFits) -> dict:
    """Return all numbers, for other programs."""
    return {
        "name": fits.name, "entropy": fits.entropy, "fits": [fit_json(fit) for fit in fits.fits],
        "cannot": fits.not_fitted, "notes": fits.notes,
        "distillation_wins": [
            {"parameters": t.parameters, "teacher": t.scenario.label, "flops": t.ranges(),
             "sure": t.ranges(beyond_noise=True), "measured_up_to": t.measured_up_to} for t in tradeoffs_of(fits)
        ],
    }  # fmt: skip


def fit_json(fit: Fit) -> dict:
    coefficients = {
        name: {"value": value, "interval": fit.interval(name), "published": fit.published.get(name),
               "known": name not in fit.undetermined}
        for name, value in fit.coefficients.items()
    }  # fmt: skip
    held_out = {
        "runs": [run.run for run, out in zip(fit.runs, fit.held_out) if out], "mean_error": fit.held_out_error,
        "mean_error_of_a_straight_line": fit.loglinear_error, "coefficients": fit.fit_coefficients,
    }  # fmt: skip
    return {
        "law": fit.law.name, "formula": fit.law.formula, "of": fit.subset, "runs": len(fit.runs),
        "coefficients": coefficients, "held_out": held_out,
        "lack_of_fit": fit.lack_of_fit and fit.lack_of_fit._asdict(), "doubts": fit.warnings,
    }  # fmt: skip


def print_fits(fits: ScalingFits, terminal: Terminal) -> None:
    """Print every law: its formula, its coefficients, and how well it holds."""
    for fit in fits.fits:
        title = f"{fit.law.name} law {fit.subset}".rstrip()
        count = counted(len(fit.runs), "run", "runs")
        terminal.print(f"{title}: {fit.law.formula}  ({count})", style="bold", soft_wrap=True)
        terminal.print(coefficient_table(fit, fits.entropy))
        terminal.print("\n".join(filter(None, [fit.held_out_text, fit.lack_of_fit_text])), "", soft_wrap=True, sep="\n")
    for line in [*fits.not_fitted, *(line for fit in fits.fits for line in fit.warnings), *fits.notes]:
        terminal.print(f"- {line}", soft_wrap=True)


def coefficient_table(fit: Fit, entropy: float | None) -> Table:
    """Return the coefficients with their intervals."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "value", "95% interval", "published", ""):
        table.add_column(name, justify="left" if not name else "right")
    for name in fit.coefficients:
        published = fit.published.get(name)
        notes = ["not known from these runs"] if name in fit.undetermined else []
        notes += [f"known: {entropy:.4f}, the entropy of the data"] if name == "E" and entropy else []
        paper = f"{published:g}" if published else ""
        table.add_row(name, fit.value_text(name), fit.interval_text(name), paper, styled("; ".join(notes), "dim"))
    return table

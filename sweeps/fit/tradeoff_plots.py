"""Plots of distillation: loss over the student's size, and the loss reduction at equal compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from statistics import fmean

import numpy as np
import plotly.graph_objects as go

from sweeps.fit import laws
from sweeps.fit.fits import ScalingFits
from sweeps.fit.plots import canvas, hover_text, with_titles
from sweeps.fit.tradeoff import SCENARIOS, ComputeTradeoff, teachers_of
from sweeps.report.groups import SUPERVISED
from sweeps.report.plots import buttons, padded
from sweeps.report.table import COLORS, GREY
from sweeps.report.wording import format_amount

SHORT_LABELS = ("free", "+ inference", "+ training", "+ both")  # of the scenarios
MOST_AMOUNTS = 4  # of tokens that have a button


def students_plot(fits: ScalingFits) -> go.Figure:
    """Return loss over the student's size, a line per teacher and one for language modelling; buttons for D."""
    assert fits.supervised and fits.distillation, "both laws are fitted"
    supervised, distillation = fits.supervised.coefficients, fits.distillation.coefficients
    teachers = teachers_of(fits.distilled_runs)
    amounts = sorted(d for d, _ in Counter(run.tokens for run in fits.distilled_runs).most_common(MOST_AMOUNTS))
    plot = canvas(500, buttons=len(amounts) > 1)
    sizes = sorted({run.parameters for run in fits.runs})
    grid, groups, ranges = np.geomspace(sizes[0] / 1.3, sizes[-1] * 1.3, 80), [], []
    for tokens in amounts:
        first, visible = len(plot.data), tokens == amounts[-1]
        baseline = laws.supervised(supervised, grid, tokens)
        series = [(SUPERVISED, baseline, fits.supervised_runs, GREY, "dash")]
        for teacher, color in zip(teachers, (*COLORS, *(GREY for _ in teachers))):
            loss = laws.distilled(distillation, grid, tokens, teacher.loss, baseline)
            runs = [run for run in fits.distilled_runs if run.teacher == teacher.label]
            series.append((f"teacher {teacher.label}, loss {teacher.loss:.3f}", loss, runs, color, "solid"))
        for name, loss, runs, color, dash in series:
            runs = [run for run in runs if run.tokens == tokens]
            plot.add_scatter(
                x=grid, y=loss, mode="lines", name=escape(name), legendgroup=name, visible=visible,
                line={"color": color, "width": 2, "dash": dash},
                hovertemplate=f"<b>{escape(name)}</b><br>%{{y:.4f}} at N = %{{x:.3s}}<extra></extra>",
            )  # fmt: skip
            plot.add_scatter(
                x=[run.parameters for run in runs], y=[run.loss for run in runs], mode="markers", legendgroup=name,
                showlegend=False, visible=visible, marker={"color": color, "size": 9},
                text=[hover_text(run) for run in runs], hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
            )  # fmt: skip
        groups.append((first, len(plot.data)))
        ranges.append(padded([*(run.loss for run in fits.runs if run.tokens == tokens), *baseline[10:-10]]))
    if len(amounts) > 1:
        labels = [f"D = {format_amount(tokens)}" for tokens in amounts]
        plot.update_layout(updatemenus=group_buttons(labels, groups, ranges, len(amounts) - 1))
    plot = with_titles(plot, "student: parameters without embeddings", "loss, nats per token")
    plot.update_yaxes(range=ranges[-1])
    return plot


def group_buttons(
    labels: Sequence[str], groups: list[tuple[int, int]], ranges: list[list[float]], active: int
) -> list[dict]:
    """Return buttons that show one group of traces each, in its own range of y."""
    count, choices = groups[-1][1], {}
    for label, (first, last), ends in zip(labels, groups, ranges):
        choices[label] = [{"visible": [first <= i < last for i in range(count)]}, {"yaxis.range": ends}]
    (menu,) = buttons(8, choices, "update")
    return [menu | {"active": active}]


def tradeoff_plot(fits: ScalingFits, tradeoffs: list[ComputeTradeoff]) -> go.Figure:
    """Return the loss reduction at equal FLOPs, a line per student; buttons for the scenarios."""
    plot = canvas(520, buttons=True)
    sizes, groups, ranges = sorted({t.parameters for t in tradeoffs}), [], []
    measured = {size: measured_reductions(fits, size) for size in sizes}
    for scenario in SCENARIOS:
        first, free = len(plot.data), scenario == SCENARIOS[0]
        for size, color in zip(sizes, (*COLORS, *(GREY for _ in sizes))):
            (tradeoff,) = [t for t in tradeoffs if t.parameters == size and t.scenario == scenario]
            add_tradeoff(plot, tradeoff, color, visible=free)
            pairs, name = measured[size] if free else [], f"student of {format_amount(size)}"
            plot.add_scatter(
                x=[compute for compute, _ in pairs], y=[reduction for _, reduction in pairs], mode="markers",
                legendgroup=name, showlegend=False, visible=free, marker={"color": color, "size": 9},
                hovertemplate=f"<b>{name}, measured</b><br>%{{y:+.4f}} nats at %{{x:.2e}} FLOPs<extra></extra>",
            )  # fmt: skip
        groups.append((first, len(plot.data)))
        # If the teacher costs nearly all FLOPs, the student hardly learns; such points would take all of the height.
        seen = [reduction for pairs in measured.values() for _, reduction in pairs]
        reductions = np.concatenate([t.loss_reduction for t in tradeoffs if t.scenario == scenario] + [[0.0, *seen]])
        high, low = max(float(np.nanmax(reductions)), 0.01), float(np.nanmin(reductions))
        ranges.append(padded([max(low, -1.5 * high), high]))
    plot.add_hline(0, line={"color": GREY, "width": 1.4})
    plot.update_layout(updatemenus=group_buttons(SHORT_LABELS, groups, ranges, 0))
    plot = with_titles(plot, "FLOPs", "gain over language modelling, nats")
    plot.update_yaxes(range=ranges[0])
    plot.update_xaxes(exponentformat="power", dtick=1)
    return plot


def add_tradeoff(plot: go.Figure, tradeoff: ComputeTradeoff, color: str, visible: bool) -> None:
    """Add a student's line: solid beyond noise, dashed within, dotted where it is extrapolated."""
    sure, beyond = (tradeoff.low > 0) | (tradeoff.high < 0), tradeoff.compute > tradeoff.measured_up_to
    name = f"student of {format_amount(tradeoff.parameters)}"
    for mask, dash, note in ((beyond, "dot", ", extrapolated"), (~beyond, "dash", ""), (sure & ~beyond, "solid", "")):
        plot.add_scatter(
            x=tradeoff.compute, y=np.where(mask, tradeoff.loss_reduction, np.nan), mode="lines", name=name,
            legendgroup=name, showlegend=dash == "solid", visible=visible,
            line={"color": color, "width": 2.2, "dash": dash},
            hovertemplate=f"<b>{name}{note}</b><br>%{{y:+.4f}} nats at %{{x:.2e}} FLOPs<extra></extra>",
        )  # fmt: skip


def measured_reductions(fits: ScalingFits, size: float) -> list[tuple[float, float]]:
    """Return compute, and mean loss alone minus mean loss with the best teacher, at each D that both were run with."""
    pairs = []
    for tokens in sorted({run.tokens for run in fits.distilled_runs if run.parameters == size}):
        supervised = [run for run in fits.supervised_runs if (run.parameters, run.tokens) == (size, tokens)]
        distilled = [run for run in fits.distilled_runs if (run.parameters, run.tokens) == (size, tokens)]
        means = [fmean(run.loss for run in distilled if run.teacher == t) for t in {run.teacher for run in distilled}]
        if supervised and means:
            pairs.append((supervised[0].compute, fmean(run.loss for run in supervised) - min(means)))
    return pairs

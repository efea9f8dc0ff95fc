"""Plots of fitted laws: predicted against measured, iso-FLOP curves, power laws over one axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from sweeps.fit import laws
from sweeps.fit.fits import Fit
from sweeps.fit.observations import Observation, column
from sweeps.report.plots import blank, padded
from sweeps.report.table import GREY
from sweeps.report.wording import format_amount

SUPERVISED, DISTILLED = "#3b78d8", "#d9772f"  # colors
HEAT = ("#3e4fb0", "#2f8fb5", "#3fa572", "#b0a02f", "#d9772f", "#c2344c")  # from little compute to much
LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
AXES = {"tokens": "D, tokens", "parameters": "N, without embeddings", "compute": "training FLOPs"}


def canvas(height: int, buttons: bool = False, **layout) -> go.Figure:
    margin = {"l": 10, "r": 16, "t": 54 if buttons else 14, "b": 10}
    return blank(height, margin=margin, legend=LEGEND, hovermode="closest", **layout)


def with_titles(plot: go.Figure, x: str, y: str, log: bool = True) -> go.Figure:
    """Add titles with units, and ticks that do not crowd a narrow window."""
    kind = {"type": "log", "dtick": "D2", "exponentformat": "B"} if log else {}
    style = {"font": {"size": 13}, "standoff": 6}
    plot.update_xaxes(title={"text": x, **style}, zeroline=False, automargin=True, nticks=6, **kind)
    plot.update_yaxes(title={"text": y, **style}, zeroline=False, automargin=True, nticks=8)
    return plot


def marker(color: str, hollow: bool) -> dict:
    """Return the style of a run: hollow if it was held out."""
    return {"color": color, "size": 9, "symbol": "circle-open" if hollow else "circle", "line": {"width": 2 * hollow}}


def hover_text(run: Observation) -> str:
    teacher = f", teacher {escape(run.teacher)} ({run.teacher_loss:.3f})" if run.teacher else ""
    size = f"<b>N = {format_amount(run.parameters)}, D = {format_amount(run.tokens)}</b>"
    return f"{size}{teacher}<br>{run.compute:.2e} FLOPs"


def agreement_plot(fits: list[Fit]) -> go.Figure:
    """Return predicted against measured loss: fitted runs are filled, held-out ones hollow."""
    plot = canvas(480)
    pairs = [(fit, run, run.loss * math.exp(e)) for fit in fits for run, e in zip(fit.runs, fit.errors)]
    ends = padded(x for _, run, predicted in pairs for x in (run.loss, predicted))
    plot.add_shape(type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1], line={"color": GREY, "width": 1.4})
    for fit, color in zip(fits, (SUPERVISED, DISTILLED)):
        for held_out, name in ((False, "fitted"), (True, "held out")):
            rows = np.flatnonzero(fit.held_out == held_out)
            if len(rows):
                some = [fit.runs[i] for i in rows]
                plot.add_scatter(
                    x=[run.loss for run in some], y=[fit.runs[i].loss * math.exp(fit.errors[i]) for i in rows],
                    mode="markers", name=f"{fit.law.name}, {name}", text=[hover_text(run) for run in some],
                    marker=marker(color, held_out),
                    hovertemplate="%{text}<br>measured %{x:.4f}, predicted %{y:.4f}<extra></extra>",
                )  # fmt: skip
    plot = with_titles(plot, "measured loss, nats per token", "predicted loss, nats per token", log=False)
    plot.update_xaxes(range=ends)
    plot.update_yaxes(range=ends)
    return plot


def flops_per_token(runs: list[Observation]) -> Callable[[np.ndarray], np.ndarray]:
    """Return forward FLOPs per token over parameters, a straight line of logarithms between the measured sizes."""
    measured = sorted({(run.parameters, run.forward_flops) for run in runs})
    n, per_parameter = np.log([x for x, _ in measured]), np.log([f / x for x, f in measured])
    return lambda size: size * np.exp(np.interp(np.log(size), n, per_parameter))


def budgets(runs: list[Observation]) -> np.ndarray:
    """Return up to six amounts of compute in the range of the runs, at least a factor of 1.5 apart."""
    low, high = min(run.compute for run in runs), max(run.compute for run in runs)
    return np.geomspace(low, high, int(np.clip(math.log(high / low, 1.5) + 1, 1, 6)))


@dataclass(frozen=True)
class BestSize:
    """Size with the lowest loss for a budget, by the law."""

    compute: float
    parameters: float
    tokens: float
    loss: float
    end: str  # smallest or largest if it is the end of the sizes shown, so that the best may be beyond


def isoflop_plot(fit: Fit) -> tuple[go.Figure, list[BestSize]]:
    """Return loss over size at equal compute, and the best size of each budget."""
    plot = canvas(470)
    sizes = sorted({run.parameters for run in fit.runs})
    grid, flops = np.geomspace(sizes[0] / 1.6, sizes[-1] * 1.6, 200), flops_per_token(fit.runs)
    levels, optima = budgets(fit.runs), []
    colors = [HEAT[round(i * (len(HEAT) - 1) / max(1, len(levels) - 1))] for i in range(len(levels))]
    for budget, color in zip(levels, colors):
        loss = laws.supervised(fit.coefficients, grid, budget / (3 * flops(grid)))
        best = int(loss.argmin())
        plot.add_scatter(
            x=grid, y=loss, mode="lines", name=f"{budget:.1e} FLOPs", line={"color": color, "width": 2},
            hovertemplate=f"<b>{budget:.1e} FLOPs</b><br>%{{y:.4f}} at N = %{{x:.3s}}<extra></extra>",
        )  # fmt: skip
        tokens = budget / (3 * float(flops(grid[best])))
        end = {0: "smallest", len(grid) - 1: "largest"}.get(best, "")
        optima.append(BestSize(float(budget), float(grid[best]), tokens, float(loss[best]), end))
        if not end:
            plot.add_scatter(
                x=[grid[best]], y=[loss[best]], mode="markers", showlegend=False,
                marker={"symbol": "star", "size": 13, "color": color},
                hovertemplate=f"<b>best at {budget:.1e} FLOPs</b><br>N = {format_amount(grid[best])}, "
                f"D = {format_amount(tokens)}, {tokens / grid[best]:.3g} tokens per parameter<extra></extra>",
            )  # fmt: skip
    nearest = [int(np.abs(np.log(levels / run.compute)).argmin()) for run in fit.runs]
    plot.add_scatter(
        x=[run.parameters for run in fit.runs], y=[run.loss for run in fit.runs], mode="markers", showlegend=False,
        marker={"color": [colors[i] for i in nearest], "size": 8}, text=[hover_text(run) for run in fit.runs],
        hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
    )  # fmt: skip
    plot = with_titles(plot, "N: parameters without embeddings", "loss, nats per token")
    plot.update_yaxes(range=padded(run.loss for run in fit.runs))
    return plot, optima


def power_plot(axis: str, fit: Fit, entropy: float | None) -> go.Figure:
    """Return a power law with its 95% band, and its runs."""
    values = column(fit.runs, axis)
    grid, plot = np.geomspace(values.min() / 1.3, values.max() * 4, 80), canvas(300)
    if fit.bootstrap:
        drawn = laws.power(laws.stacked_samples(fit.bootstrap), grid)  # [B, n]
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        plot.add_scatter(x=[*grid, *grid[::-1]], y=[*high, *low[::-1]], fill="toself", mode="none", hoverinfo="skip",
                         fillcolor="rgba(59,120,216,0.18)", showlegend=False)  # fmt: skip
    curve = laws.power(fit.coefficients, grid)
    plot.add_scatter(x=grid, y=curve, mode="lines", line={"color": SUPERVISED, "width": 2}, showlegend=False,
                     hovertemplate="%{y:.4f} at %{x:.3s}<extra></extra>")  # fmt: skip
    for held_out in (False, True):
        rows = np.flatnonzero(fit.held_out == held_out)
        plot.add_scatter(
            x=values[rows], y=[fit.runs[i].loss for i in rows], mode="markers", showlegend=False,
            marker=marker(SUPERVISED, held_out),
            text=[hover_text(fit.runs[i]) for i in rows], hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
        )  # fmt: skip
    lines = {"E": fit.coefficients["E"]} if fit.coefficients["E"] > curve.min() - 1.5 * np.ptp(curve) else {}
    lines |= {"entropy": entropy} if entropy else {}
    for side, (name, y) in enumerate(lines.items()):
        plot.add_hline(y, line={"color": GREY, "width": 1.4, "dash": "dot" if name == "entropy" else "dash"})
        plot.add_annotation(text=f"{name} {y:.3f}", x=side, xref="paper", xanchor="right" if side else "left", y=y,
                            yanchor="bottom", showarrow=False, font={"size": 12})  # fmt: skip
    plot = with_titles(plot, AXES[axis], "loss, nats per token")
    plot.update_yaxes(range=padded([*(run.loss for run in fit.runs), *curve[5:], *lines.values()]))
    if axis == "compute":
        plot.update_xaxes(exponentformat="power", dtick=1)
    return plot

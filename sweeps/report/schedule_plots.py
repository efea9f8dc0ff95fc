"""Plots of the schedules of a sweep, a card for each kind."""

from __future__ import annotations

import inspect
from html import escape
from statistics import fmean

import plotly.graph_objects as go

from kd.errors import UserError
from kd.runs.identity import is_under
from kd.training import schedules
from sweeps.report.axis_plots import Plot, axis_title, distilled_rows
from sweeps.report.groups import label, varying
from sweeps.report.plots import blank
from sweeps.report.table import COLORS, Row

ROLES = {"alpha": "share of distillation", "lr": "learning rate"}
SHAPES = {name: f for name, f in vars(schedules).items() if inspect.isfunction(f) and not name.startswith("_")}


def schedule_plots(table: list[Row]) -> list[Plot]:
    """Return the schedules of alpha and of the learning rate, a plot for each kind, if the kind varies."""
    plots = []
    for role, title in ROLES.items():
        rows = distilled_rows(table) if role == "alpha" else table
        sides = [[r.group.config for r in rows if r.group.supervised is side] for side in (False, True)]
        keys = [k for k in dict.fromkeys(k for configs in sides for k in varying(configs)) if is_under(k, [role])]
        if role not in keys:
            continue
        curves: dict[str, dict[str, list[float]]] = {}
        for config in (row.group.config for row in rows if role in row.group.config):
            name = label(config, [k for k in keys if k != role])
            curves.setdefault(str(config[role]), {}).setdefault(name, schedule_values(config, role))
        top = max((max(y) for kind in curves.values() for y in kind.values() if y), default=1.0)
        plots += [Plot(schedule_plot(kind, title, top), f"{role}={name}") for name, kind in curves.items()]
    return plots


def schedule_values(config: dict, role: str, points: int = 200) -> list[float]:
    """Return a schedule at the middle of each of `points` steps; empty if this version has no such schedule."""
    settings = {k.removeprefix(f"{role}."): v for k, v in config.items() if k.startswith(f"{role}.")}
    if "cycles" in settings:
        settings["cycles"] = int(settings["cycles"])
    try:
        return [float(SHAPES[config[role]]((i + 0.5) / points, **settings)) for i in range(points)]
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError):
        return []


def schedule_plot(curves: dict[str, list[float]], title: str, top: float) -> go.Figure:
    """Return the schedules of one kind, each with its mean, since the amount of distillation differs with it."""
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.32, "yanchor": "top"}
    plot = blank(216 + 20 * len(curves), legend=legend, dragmode=False, margin={"l": 10, "r": 12, "t": 10, "b": 10})
    for (name, y), color in zip(curves.items(), COLORS):
        text = f"{name or title}, mean {fmean(y):.3g}" if y else f"{name or title}: not in this version"
        plot.add_scatter(x=[(i + 0.5) / len(y) for i in range(len(y))], y=y, mode="lines", name=escape(text),
                         line={"color": color, "width": 2.2}, hovertemplate="%{y:.3g}<extra></extra>")  # fmt: skip
    plot.update_xaxes(title=axis_title("share of the run"), range=[0, 1], tickvals=[0, 0.5, 1])
    plot.update_yaxes(title=axis_title(title), range=[0, 1.06 * top], nticks=4, automargin=True)
    plot.update_xaxes(fixedrange=True, zeroline=False, automargin=True)
    plot.update_yaxes(fixedrange=True, zeroline=False)
    return plot.update_layout(showlegend=True)

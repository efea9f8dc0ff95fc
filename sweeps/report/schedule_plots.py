"""The schedules of a sweep as small plots, a card for each kind."""

from __future__ import annotations

import inspect
from html import escape
from statistics import fmean

import plotly.graph_objects as go

from kd import schedules
from kd.errors import UserError
from sweeps.compare import below, label, listed, varying
from sweeps.plots import blank
from sweeps.space import Plot, sentence, taught, titled
from sweeps.table import COLORS, Row, number

ROLES = {"alpha": "share of distillation", "lr": "learning rate"}
SHAPES = {name: f for name, f in vars(schedules).items() if inspect.isfunction(f) and not name.startswith("_")}


def drawn(table: list[Row]) -> list[Plot]:
    """The schedules of the share of distillation and of the rate, a plot for each kind, where the kind varies."""
    made = []
    for role, title in ROLES.items():
        rows = taught(table) if role == "alpha" else table
        kinds = [[r.group.config for r in rows if r.group.alone is alone] for alone in (False, True)]
        keys = [k for k in dict.fromkeys(k for some in kinds for k in varying(some)) if below(k, [role])]
        if role not in keys:
            continue
        found: dict[str, dict[str, list[Row]]] = {}
        for row in rows:
            config = row.group.config
            if role in config:
                name = label(config, [k for k in keys if k != role])
                found.setdefault(str(config[role]), {}).setdefault(name, []).append(row)
        curves = {kind: {name: shape(some[0].group.config, role) for name, some in of.items()}
                  for kind, of in found.items()}  # fmt: skip
        top = max((max(y) for of in curves.values() for y in of.values() if y), default=1.0)
        for kind, of in curves.items():
            known = {name: y for name, y in of.items() if y}
            made.append(Plot(small(known, title, top), f"{role}={kind}", about(found[kind], known, role)))
    return made


def shape(config: dict, role: str, points: int = 200) -> list[float]:
    """A schedule at the middle of each of so many steps; empty where this version has none such."""
    settings = {k.removeprefix(f"{role}."): v for k, v in config.items() if k.startswith(f"{role}.")}
    if "cycles" in settings:
        settings["cycles"] = int(settings["cycles"])
    try:
        return [float(SHAPES[config[role]]((i + 0.5) / points, **settings)) for i in range(points)]
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError):
        return []


def small(curves: dict[str, list[float]], title: str, top: float) -> go.Figure:
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.32, "yanchor": "top"}
    plot = blank(216 + 20 * (len(curves) if len(curves) > 1 else 0), legend=legend, dragmode=False,
                 margin={"l": 10, "r": 12, "t": 10, "b": 10})  # fmt: skip
    for (name, y), color in zip(curves.items(), COLORS):
        plot.add_scatter(x=[(i + 0.5) / len(y) for i in range(len(y))], y=y, mode="lines", name=escape(name),
                         line={"color": color, "width": 2.2}, hovertemplate="%{y:.3g}<extra></extra>")  # fmt: skip
    plot.update_xaxes(title=titled("share of the run"), range=[0, 1], tickvals=[0, 0.5, 1])
    plot.update_yaxes(title=titled(title), range=[0, 1.06 * top], nticks=4, automargin=True)
    plot.update_xaxes(fixedrange=True, zeroline=False, automargin=True)
    plot.update_yaxes(fixedrange=True, zeroline=False)
    return plot.update_layout(showlegend=len(curves) > 1)


def about(rows: dict[str, list[Row]], known: dict[str, list[float]], role: str) -> str:
    """Means of schedules, since with them the amount of distillation differs too, and the lowest loss with them."""
    means = [f"{fmean(y):.3g}" for y in known.values()]
    what = "mean over the run" if len(means) == 1 else "means over the run"
    best = min((row for some in rows.values() for row in some), key=lambda row: row.group.mean().mean)
    lost = sorted(set(rows) - set(known))
    return sentence(
        f"{what} {listed(means)}" if means else "",
        f"lowest loss with it {number(best.group.mean().mean)} ({best.group.label})",
        f"{len(lost)} not drawn: this version has no such schedule" if lost else "",
    )

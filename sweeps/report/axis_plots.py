"""Plots over the axes of a sweep: a heat map of two, lines over a numeric one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from itertools import product

import plotly.graph_objects as go

from sweeps.report.axes import Coordinates, axes_of
from sweeps.report.groups import SUPERVISED, Group, comparable, distinct_labels
from sweeps.report.plots import blank, folded, padded
from sweeps.report.statistics import indistinguishable
from sweeps.report.table import COLORS, GREY, Row
from sweeps.report.wording import format_number

BETTER, WORSE = (59, 120, 216), (217, 119, 47)  # colors, as in the other plots


@dataclass(frozen=True)
class Plot:
    """Figure with its title."""

    figure: go.Figure
    title: str
    width: int = 0  # pixels that it needs


def distilled_rows(table: list[Row]) -> list[Row]:
    """Return the distilled rows. In a sweep without any, return all rows, without a baseline."""
    return [row for row in table if row.group.distilled] or [
        replace(row, baseline=None, difference=None) for row in table
    ]


def heat_map(table: list[Row]) -> Plot | None:
    """Return two crossed axes: the paired difference to the baseline, or the loss if some row has no baseline."""
    rows = distilled_rows(table)
    groups = [row.group for row in rows]
    keys = axes_of(groups)
    if len(keys) != 2 or any(row.group.config.get(key) is None for row in rows for key in keys):
        return None
    down, across = sorted((Coordinates(key, groups) for key in keys), key=lambda axis: -len(axis.ordered_texts()))
    x, y = across.ordered_texts(), down.ordered_texts()
    cells = {(across.text(row.group), down.text(row.group)): row for row in rows}
    if len(cells) < len(x) + len(y):  # no more than a cross: nothing is crossed
        return None
    paired = all(row.difference for row in rows)
    plot = blank(66 * len(y) + 130, margin={"l": 10, "r": 10, "t": 8, "b": 92}, dragmode=False)
    plot.add_heatmap(**colored([[cells.get((i, j)) for i in x] for j in y], paired))
    alike = labels_within_noise(rows, paired)
    annotations, frames = [], []
    for (i, across_at), (j, down_at) in product(enumerate(x), enumerate(y)):
        row = cells.get((across_at, down_at))
        marked = row is not None and row.group.label in alike
        text = cell_text(row, paired, marked)
        annotations.append({"x": i, "y": j, "text": text, "showarrow": False, "font": {"size": 13}})
        if marked:
            frame = {"x0": i - 0.46, "x1": i + 0.46, "y0": j - 0.43, "y1": j + 0.43}
            frames.append({"type": "rect", **frame, "line": {"color": GREY, "width": 1.6, "dash": "dot"}})
    plot.update_layout(annotations=annotations, shapes=frames)  # at once: plotly copies them all for each that is added
    for update, axis, texts in ((plot.update_xaxes, across, x), (plot.update_yaxes, down, y)):
        update(title=axis_title(axis.short_title), tickvals=list(range(len(texts))), ticks="",
               ticktext=[folded(text, 18) for text in texts], fixedrange=True, showgrid=False, zeroline=False,
               automargin=True, tickangle=0)  # fmt: skip
    plot.update_yaxes(range=[len(y) - 0.5, -0.5])
    title = f"difference to {SUPERVISED}, nats per token" if paired else "loss, nats per token"
    return Plot(plot, title, 88 * (len(x) + 1))


def colored(cells: list[list[Row | None]], paired: bool) -> dict:
    """Return the colors of a heat map: of the differences, or of the losses above the lowest of the same task."""
    rows = [row for line in cells for row in line if row]
    lowest: dict[str, float] = {}
    for row in rows:
        lowest[row.group.task] = min(row.group.required_mean().mean, lowest.get(row.group.task, math.inf))
    levels = lowest if len(lowest) > 1 else {}

    def height(row: Row | None) -> float | None:
        if row is None:
            return None
        if paired:
            return row.difference and row.difference.mean
        return row.group.required_mean().mean - levels.get(row.group.task, 0.0)

    z = [[height(row) for row in line] for line in cells]
    heights = [value for line in z for value in line if value is not None]
    furthest = max(map(abs, heights)) or 1
    scale = [[0, rgba(BETTER, 0.8)], [0.5, rgba(BETTER, 0)], [0.5, rgba(WORSE, 0)], [1, rgba(WORSE, 0.8)]]
    bar = {"orientation": "h", "thickness": 8, "len": 0.7, "y": 0, "yref": "container", "yanchor": "bottom",
           "nticks": 4, "tickangle": 0, "outlinewidth": 0}  # fmt: skip
    return {
        "z": z, "x": list(range(len(z[0]))), "y": list(range(len(z))), "hoverinfo": "skip", "xgap": 2, "ygap": 2,
        "colorscale": scale if paired else [[0, rgba(BETTER, 0.8)], [1, rgba(BETTER, 0.05)]],
        "zmin": -furthest if paired else min(heights), "zmax": furthest if paired else max(heights), "colorbar": bar,
    }  # fmt: skip


def labels_within_noise(rows: list[Row], paired: bool) -> set[str]:
    """Return the groups within noise of their baseline.

    If some row has no baseline, return those within noise of the lowest loss of their task.
    """
    if paired:
        return {row.group.label for row in rows if row.difference and row.difference.within_noise}
    tasks: dict[str, list[Group]] = {}
    for row in rows:
        tasks.setdefault(row.group.task, []).append(row.group)
    return {g.label for task in tasks.values() for g in indistinguishable(lowest_loss(task), task)}


def lowest_loss(groups: list[Group]) -> Group:
    return min(groups, key=lambda group: group.required_mean().mean)


def cell_text(row: Row | None, paired: bool, marked: bool) -> str:
    if row is None:
        return "–"
    mean = (row.difference if paired else None) or row.group.required_mean()
    half = f'<br><span style="font-size:11px">± {format_number(mean.half)}</span>' if mean.half is not None else ""
    return f"{'≈ ' if marked else ''}{format_number(mean.mean, 4, paired)}{half}"


def axis_title(text: str) -> dict:
    return {"text": escape(text), "standoff": 6, "font": {"size": 13}}


def rgba(color: tuple[int, int, int], share: float) -> str:
    return f"rgba({', '.join(map(str, color))}, {share})"


def line_plots(table: list[Row]) -> list[Plot]:
    """Return the loss over each numeric axis with three values or more at equal other settings."""
    rows = distilled_rows(table)
    groups = [row.group for row in rows]
    keys, plots, steps = axes_of(groups), [], Coordinates("trainer.steps", groups)
    for key in keys:
        axis = Coordinates(key, groups)
        # A setting of another option, such as temperature.tau of normkd, is not on this axis but beside it.
        on_axis = [row for row in rows if type(axis.value(row.group)) is float]
        off_axis = [row for row in rows if axis.value(row.group) is None]
        others = [k for k in keys if k != key]
        lines: dict[tuple, list[Row]] = {}
        for row in sorted(on_axis, key=lambda row: axis.number(row.group)):
            settings = tuple(comparable(row.group.config.get(k)) for k in others)
            lines.setdefault(settings, []).append(row)
        names = line_names([line[0].group for line in lines.values()], others, steps)
        series = list(zip(names, lines.values(), strict=True))  # names may be equal: true, "true"
        if len(series) <= 6 and any(len(line) > 2 for _, line in series):
            plots.append(Plot(line_plot(axis, series, off_axis if len(off_axis) <= 4 else []), key))
    return plots


def line_names(groups: list[Group], keys: list[str], steps: Coordinates) -> list[str]:
    """Return the settings of lines as text; steps as tokens only if these tell lines apart. groups: one of each line"""
    if steps.tokens or steps.key not in keys:
        return distinct_labels([(group.config, keys) for group in groups], [None] * len(groups))
    others = [key for key in keys if key != steps.key]
    names = distinct_labels([(group.config, others) for group in groups], [None] * len(groups))
    return [f"{name} steps={steps.text(group)}".strip() for name, group in zip(names, groups, strict=True)]


def line_plot(axis: Coordinates, series: list[tuple[str, list[Row]]], constant: list[Row]) -> go.Figure:
    """Return the loss over one axis, a line per series; `constant` rows and the baseline as levels.

    series: name and rows of each line.
    """
    rows = [row for _, line in series for row in line]
    several, bases = len(series) > 1, baselines(axis, rows)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.18, "yanchor": "top"}
    plot = blank(430, margin={"l": 10, "r": 16, "t": 14, "b": 10}, hovermode="closest", legend=legend)
    for (name, line), color in zip(series, COLORS):
        kind = SUPERVISED if line[0].group.supervised else "distilled"
        points = {axis.number(row.group): row.group for row in line}
        dots = {"size": 9, "color": [color if several else row.color for row in line]}
        plot.add_scatter(**trace(points, name or kind, color if several else GREY, marker=dots))
    ends = [min(axis.number(row.group) for row in rows), max(axis.number(row.group) for row in rows)]
    levels = [(row.group, row.color, "dot", row.group.label) for row in constant]
    if len({id(group) for group in bases.values()}) == 1:
        levels.append((next(iter(bases.values())), GREY, "dash", SUPERVISED))
    elif bases:
        plot.add_scatter(**trace(bases, SUPERVISED, GREY, dash="dash", marker={"size": 8, "color": GREY}))
    for group, color, dash, name in levels:
        mean = group.required_mean()
        plot.add_scatter(
            x=ends, y=[mean.mean] * 2, mode="lines", name=escape(name), line={"color": color, "width": 2, "dash": dash},
            hovertemplate=f"<b>{folded(name)}</b><br>%{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        if mean.half:
            plot.add_hrect(mean.mean - mean.half, mean.mean + mean.half, fillcolor=color, opacity=0.1, line_width=0)
    ticks = {axis.value(row.group): axis.text(row.group) for row in rows}
    transform = scale(ends)
    plot.update_xaxes(title=axis_title(axis.title or axis.key), zeroline=False, automargin=True)
    if len(ticks) <= 10:
        plot.update_xaxes(tickvals=list(ticks), ticktext=[escape(t) for t in ticks.values()], tickangle=0)
    plot.update_xaxes(type="log" if transform is math.log10 else "linear", range=padded(map(transform, ends)))
    plot.update_yaxes(title=axis_title("loss, nats per token"), zeroline=False, automargin=True, nticks=7)
    return plot.update_layout(showlegend=True)


def trace(points: dict[float, Group], name: str, color: str, *, dash: str = "solid", marker: dict) -> dict:
    """Return a line of mean losses with their intervals."""
    means = [group.required_mean() for group in points.values()]
    return {
        "x": list(points), "y": [m.mean for m in means], "mode": "lines+markers", "name": escape(name),
        "line": {"color": color, "width": 2, "dash": dash}, "marker": marker,
        "error_y": {"array": [m.half or 0 for m in means], "thickness": 1.4, "width": 4, "color": color},
        "text": [folded(group.label) for group in points.values()],
        "hovertemplate": "<b>%{text}</b><br>%{y:.4f}<extra></extra>",
    }  # fmt: skip


def scale(values: list[float]) -> Callable[[float], float]:
    """Return log10 if the values span more than a factor of 8, else the identity."""
    return math.log10 if min(values) > 0 and max(values) / min(values) > 8 else float


def baselines(axis: Coordinates, rows: list[Row]) -> dict[float, Group]:
    """Return the baseline at each value; nothing if rows at one value differ in it."""
    bases: dict[float, Group] = {}
    for row in rows:
        if row.baseline is None:
            return {}
        if bases.setdefault(axis.number(row.group), row.baseline) is not row.baseline:
            return {}
    return bases

"""Plots of a sweep in the style of its page: a measure per row, and learning curves."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from html import escape

import plotly.graph_objects as go

from sweeps.compare import curve, excess
from sweeps.table import GREY, Mark, Row

SMALL = {  # measures with a plot of their own
    "val/on_policy_rkl": "on its own text; lower is closer to the teacher",
    "val/exaccerr": "lower is less exposure bias",
    "val/fkl": "lower is closer to the teacher",
    "val/acceptance": "higher is closer to the teacher",
    "val/ece": "lower is better calibrated",
}


def blank(height: int, **layout) -> go.Figure:
    """An empty plot in the style of the page, which adds the colors of text and grid."""
    font = {"family": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", "size": 13}
    style = {"template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": font}
    return go.Figure(layout=go.Layout(height=height, **style, **layout))


MARK = "\u200b "  # where a word may break: a space that is told from those of the text


def folded(text: str, width: int = 24) -> str:
    """A label for a plot: short lines, and no markup of its own. Words too long for a line break behind _ and =."""
    words = [re.sub(r"(?<=[_=])(?=.)", MARK, word) if len(word) > width else word for word in text.split()]
    lines = textwrap.wrap(" ".join(words), width)
    return "<br>".join(escape(line.replace(MARK, "").replace(MARK[0], "")) for line in lines)


def switch(above: int, choices: dict[str, list], method: str) -> list[dict]:
    """Buttons over a plot: what plotly is to be told by each."""
    buttons = [{"label": title, "method": method, "args": arguments} for title, arguments in choices.items()]
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": above}}
    return [{"type": "buttons", "direction": "right", "buttons": buttons, **place}]


def padded(values: Iterable[float]) -> list[float]:
    """A range with a little room on both sides."""
    low, high = min(values := list(values)), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return [low - room, high + room]


def dots(table: list[Row], measure: str, beside: Iterable[Mark] = (), width: int = 24) -> go.Figure | None:
    """A measure per group: its mean, interval and single seeds, and lines for what stands beside. None of nothing."""
    shown = [(row, row.group.of(measure), row.group.mean(measure)) for row in table if row.group.of(measure)]
    if not shown:
        return None
    labels = [folded(row.group.label, width) for row, _, _ in shown]
    beside = sorted((mark for mark in beside if measure in mark.values), key=lambda mark: mark.values[measure])
    top, tall = 18 * len(beside) + (48 if beside else 10), 14 + 17 * max(1 + text.count("<br>") for text in labels)
    plot = blank(tall * len(shown) + top + 40, margin={"l": 8, "r": 20, "t": top, "b": 30}, dragmode=False)
    plot.update_layout(showlegend=False)
    for at, (row, seeds, mean) in enumerate(shown):
        says = f"<b>{labels[at]}</b><br>%{{x:.4f}}"
        if len(seeds) > 1:
            plot.add_scatter(
                x=list(seeds.values()), y=[at] * len(seeds), text=[f"seed {seed}" for seed in seeds], mode="markers",
                marker={"color": row.color, "size": 7, "opacity": 0.35},
                hovertemplate=f"{says} %{{text}}<extra></extra>",
            )  # fmt: skip
        half = mean.half or 0
        plot.add_scatter(
            x=[mean.mean], y=[at], mode="markers", marker={"color": row.color, "size": 11},
            error_x={"array": [half], "color": row.color, "thickness": 1.6, "width": 5 if half else 0},
            hovertemplate=f"{says}{f' ± {half:.4f}' if half else ''}<extra></extra>",
        )  # fmt: skip
    near = [
        x for _, seeds, mean in shown for x in (*seeds.values(), *(mean.mean + s * (mean.half or 0) for s in (-1, 1)))
    ]
    near, whole = padded(near), padded(near + [mark.values[measure] for mark in beside])
    plot.update_xaxes(range=whole, zeroline=False, fixedrange=True, nticks=6 if width > 20 else 4, tickangle=0)
    plot.update_yaxes(range=[len(shown) - 0.5, -0.5], tickvals=list(range(len(shown))), ticktext=labels)
    plot.update_yaxes(automargin=True, showgrid=False, zeroline=False, fixedrange=True, ticklabelstandoff=8)
    beyond = 7 * max(len(line) for text in labels for line in text.split("<br>"))
    for level, mark in enumerate(beside):
        x = mark.values[measure]
        place = {"x": x, "y": 1, "yref": "paper", "yshift": 18 * level, "yanchor": "bottom"}
        # To the side with more room in a narrow window, where the plot has some 200 pixels and its labels stand beside.
        share = (x - whole[0]) / (whole[1] - whole[0])
        place["xanchor"] = "right" if 200 * share + beyond > 200 * (1 - share) else "left"
        plot.add_vline(x, line={"color": GREY, "width": 1.6, "dash": mark.dash}, layer="below")
        plot.add_annotation(text=f"{escape(mark.label)} {x:.3f}", showarrow=False, font={"size": 12}, **place)
    if beside:
        ranges = {"everything": [{"xaxis.range": whole}], "students only": [{"xaxis.range": near}]}
        plot.update_layout(updatemenus=switch(18 * len(beside) + 8, ranges, "relayout"))
    return plot


BELOW = {"orientation": "h", "y": -0.17, "yanchor": "top", "x": 0}  # a legend


def line_of(row: Row) -> dict:
    """How the line of a group is drawn and called."""
    style = {"color": row.color, "width": 2, "dash": "dash" if row.group.alone else "solid"}
    return {"name": folded(row.group.label, 40), "line": style, "showlegend": row.group.alone or row.color != GREY}


def curves(table: list[Row], beside: Iterable[Mark]) -> go.Figure | None:
    """Loss on held-out text against tokens or FLOPs, a line per group. None where nothing was measured on the way."""
    drawn = [(row, line) for row in table if (line := curve(row.group))]
    if not drawn:
        return None
    plot = blank(500, margin={"l": 56, "r": 12, "t": 54, "b": 50}, hovermode="closest", legend=BELOW)
    for row, line in drawn:
        tokens, _, loss = zip(*line)
        plot.add_scatter(
            x=tokens, y=loss, mode="lines+markers", marker={"size": 5}, **line_of(row),
            hovertemplate=f"<b>{folded(row.group.label)}</b><br>%{{y:.4f}} at %{{x:.4s}}<extra></extra>",
        )  # fmt: skip
    levels = [mark.values["val/lm"] for mark in beside]
    for mark, y in zip(beside, levels):
        plot.add_hline(y, line={"color": GREY, "width": 1.6, "dash": mark.dash}, layer="below")
        place = {"x": 1, "xref": "paper", "xanchor": "right", "y": y, "yanchor": "bottom"}
        plot.add_annotation(text=escape(mark.label), showarrow=False, font={"size": 12}, **place)
    # The first steps would take nearly all of the height.
    later = [loss for _, line in drawn for _, _, loss in line[len(line) // 3 :]]
    plot.update_yaxes(title="loss, nats per token", range=padded(later + levels), zeroline=False)
    plot.update_xaxes(title={"text": "tokens", "standoff": 4}, zeroline=False)
    choices = {}
    for i, name in enumerate(("tokens", "FLOPs")):
        x = [[point[i] for point in line] for _, line in drawn]
        choices[f"against {name}"] = [{"x": x}, {"xaxis.title.text": name, "xaxis.autorange": True}]
    plot.update_layout(updatemenus=switch(8, choices, "update"))
    return plot


def exposure(table: list[Row]) -> go.Figure | None:
    """ExAccErr over the length of a response, a line per group. None where no run has one."""
    drawn = [(row, line) for row in table if (line := excess(row.group))]
    if not drawn:
        return None
    plot = blank(430, margin={"l": 72, "r": 12, "t": 14, "b": 50}, hovermode="closest", legend=BELOW)
    for row, line in drawn:
        plot.add_scatter(
            x=list(range(1, len(line) + 1)), y=line, mode="lines", **line_of(row),
            hovertemplate=f"<b>{folded(row.group.label)}</b><br>%{{y:.1%}} at %{{x}} tokens<extra></extra>",
        )  # fmt: skip
    plot.add_hline(0, line={"color": GREY, "width": 1.2}, layer="below")
    plot.update_yaxes(title={"text": "excess accumulated error", "standoff": 8}, tickformat=".0%", zeroline=False)
    plot.update_xaxes(title={"text": "tokens of a response", "standoff": 4}, zeroline=False)
    return plot.update_layout(showlegend=True)

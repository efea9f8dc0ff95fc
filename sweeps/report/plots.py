"""Plots in the style of a report's page: a metric per row, and learning curves."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from html import escape

import plotly.graph_objects as go

from kd.evaluation.catalog import LOSS
from sweeps.report.curves import exposure_curve, learning_curve
from sweeps.report.table import GREY, ReferenceLine, Row


def blank(height: int, **layout) -> go.Figure:
    """Return an empty plot; the page adds the colors of text and grid."""
    font = {"family": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", "size": 13}
    style = {"template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": font}
    return go.Figure(layout=go.Layout(height=height, **style, **layout))


BREAK = "\u200b "  # where a word may break: a space that differs from those of the text


def folded(text: str, width: int = 24) -> str:
    """Return a label in short lines, without markup of its own. Words too long for a line break behind _ and =."""
    words = [re.sub(r"(?<=[_=])(?=.)", BREAK, word) if len(word) > width else word for word in text.split()]
    lines = textwrap.wrap(" ".join(words), width)
    return "<br>".join(escape(line.replace(BREAK, "").replace(BREAK[0], "")) for line in lines)


def buttons(above: int, choices: dict[str, list], method: str) -> list[dict]:
    """Return buttons over a plot, with each button's arguments for plotly."""
    items = [{"label": title, "method": method, "args": arguments} for title, arguments in choices.items()]
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": above}}
    return [{"type": "buttons", "direction": "right", "buttons": items, **place}]


def padded(values: Iterable[float]) -> list[float]:
    """Return a range with some room on both sides."""
    low, high = min(values := list(values)), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return [low - room, high + room]


def dots(table: list[Row], key: str, lines: Iterable[ReferenceLine] = (), width: int = 24) -> go.Figure | None:
    """Return a metric per group: mean, interval, single seeds and reference lines; None if no group has the metric."""
    shown = [(row, row.group.values(key), mean) for row in table if (mean := row.group.mean(key))]
    if not shown:
        return None
    labels = [folded(row.group.label, width) for row, _, _ in shown]
    lines = sorted((line for line in lines if key in line.values), key=lambda line: line.values[key])
    top, line_height = 18 * len(lines) + (48 if lines else 10), 14 + 17 * max(1 + text.count("<br>") for text in labels)
    plot = blank(line_height * len(shown) + top + 40, margin={"l": 8, "r": 20, "t": top, "b": 30}, dragmode=False)
    plot.update_layout(showlegend=False)
    for y, (row, seeds, mean) in enumerate(shown):
        hover = f"<b>{labels[y]}</b><br>%{{x:.4f}}"
        if len(seeds) > 1:
            plot.add_scatter(
                x=list(seeds.values()), y=[y] * len(seeds), text=[f"seed {seed}" for seed in seeds], mode="markers",
                marker={"color": row.color, "size": 7, "opacity": 0.35},
                hovertemplate=f"{hover} %{{text}}<extra></extra>",
            )  # fmt: skip
        half = mean.half or 0
        plot.add_scatter(
            x=[mean.mean], y=[y], mode="markers", marker={"color": row.color, "size": 11},
            error_x={"array": [half], "color": row.color, "thickness": 1.6, "width": 5 if half else 0},
            hovertemplate=f"{hover}{f' ± {half:.4f}' if half else ''}<extra></extra>",
        )  # fmt: skip
    values = [x for _, seeds, _ in shown for x in seeds.values()]
    values += [mean.mean + sign * (mean.half or 0) for _, _, mean in shown for sign in (-1, 1)]
    students, with_references = padded(values), padded(values + [line.values[key] for line in lines])
    plot.update_xaxes(
        range=with_references, zeroline=False, fixedrange=True, nticks=6 if width > 20 else 4, tickangle=0
    )
    plot.update_yaxes(range=[len(shown) - 0.5, -0.5], tickvals=list(range(len(shown))), ticktext=labels)
    plot.update_yaxes(automargin=True, showgrid=False, zeroline=False, fixedrange=True, ticklabelstandoff=8)
    label_width = 7 * max(len(line) for text in labels for line in text.split("<br>"))
    for level, line in enumerate(lines):
        draw_reference(plot, line, key, with_references, level, label_width)
    if lines:
        ranges = {"everything": [{"xaxis.range": with_references}], "students only": [{"xaxis.range": students}]}
        plot.update_layout(updatemenus=buttons(18 * len(lines) + 8, ranges, "relayout"))
    return plot


def draw_reference(
    plot: go.Figure, line: ReferenceLine, key: str, ends: list[float], level: int, label_width: int
) -> None:
    """Add a reference line with its label, to the side that has more room in a narrow window.

    There the plot has some 200 pixels, and the labels of its rows stand beside it.
    """
    x = line.values[key]
    share = (x - ends[0]) / (ends[1] - ends[0])
    side = "right" if 200 * share + label_width > 200 * (1 - share) else "left"
    place = {"x": x, "y": 1, "yref": "paper", "yshift": 18 * level, "yanchor": "bottom", "xanchor": side}
    plot.add_vline(x, line={"color": GREY, "width": 1.6, "dash": line.dash}, layer="below")
    plot.add_annotation(text=f"{escape(line.label)} {x:.3f}", showarrow=False, font={"size": 12}, **place)


BELOW = {"orientation": "h", "y": -0.17, "yanchor": "top", "x": 0}  # a legend


def line_of(row: Row) -> dict:
    """Return the style and the name of a group's line."""
    style = {"color": row.color, "width": 2, "dash": "dash" if row.group.supervised else "solid"}
    return {"name": folded(row.group.label, 40), "line": style, "showlegend": row.group.supervised or row.color != GREY}


def learning_curves(table: list[Row], lines: list[ReferenceLine]) -> go.Figure | None:
    """Return validation loss over tokens or FLOPs, a line per group; None if nothing was measured during training."""
    drawn = [(row, curve) for row in table if (curve := learning_curve([*row.group.runs.values()]))]
    if not drawn:
        return None
    plot = blank(500, margin={"l": 56, "r": 12, "t": 54, "b": 50}, hovermode="closest", legend=BELOW)
    for row, curve in drawn:
        tokens, _, loss = zip(*curve)
        plot.add_scatter(
            x=tokens, y=loss, mode="lines+markers", marker={"size": 5}, **line_of(row),
            hovertemplate=f"<b>{folded(row.group.label)}</b><br>%{{y:.4f}} at %{{x:.4s}}<extra></extra>",
        )  # fmt: skip
    levels = [line.values[LOSS.key] for line in lines]
    for line, y in zip(lines, levels):
        plot.add_hline(y, line={"color": GREY, "width": 1.6, "dash": line.dash}, layer="below")
        place = {"x": 1, "xref": "paper", "xanchor": "right", "y": y, "yanchor": "bottom"}
        plot.add_annotation(text=escape(line.label), showarrow=False, font={"size": 12}, **place)
    # The first steps would take nearly all of the height.
    later_losses = [loss for _, curve in drawn for _, _, loss in curve[len(curve) // 3 :]]
    plot.update_yaxes(title="loss, nats per token", range=padded(later_losses + levels), zeroline=False)
    plot.update_xaxes(title={"text": "tokens", "standoff": 4}, zeroline=False)
    choices = {}
    for i, name in enumerate(("tokens", "FLOPs")):
        x = [[point[i] for point in curve] for _, curve in drawn]
        choices[f"against {name}"] = [{"x": x}, {"xaxis.title.text": name, "xaxis.autorange": True}]
    plot.update_layout(updatemenus=buttons(8, choices, "update"))
    return plot


def exposure_curves(table: list[Row]) -> go.Figure | None:
    """Return ExAccErr over the length of a response, a line per group; None if no run has one."""
    drawn = [(row, curve) for row in table if (curve := exposure_curve([*row.group.runs.values()]))]
    if not drawn:
        return None
    plot = blank(430, margin={"l": 72, "r": 12, "t": 14, "b": 50}, hovermode="closest", legend=BELOW)
    for row, curve in drawn:
        plot.add_scatter(
            x=list(range(1, len(curve) + 1)), y=curve, mode="lines", **line_of(row),
            hovertemplate=f"<b>{folded(row.group.label)}</b><br>%{{y:.1%}} at %{{x}} tokens<extra></extra>",
        )  # fmt: skip
    plot.add_hline(0, line={"color": GREY, "width": 1.2}, layer="below")
    plot.update_yaxes(title={"text": "excess accumulated error", "standoff": 8}, tickformat=".0%", zeroline=False)
    plot.update_xaxes(title={"text": "tokens of a response", "standoff": 4}, zeroline=False)
    return plot.update_layout(showlegend=True)

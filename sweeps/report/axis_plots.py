"""What the axes of a sweep do: a heat map of two, lines over a numeric one, parallel coordinates."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape
from itertools import product
from statistics import fmean
from typing import NamedTuple

import plotly.graph_objects as go

from sweeps.compare import ALONE, LOSS, Group, amount, difference, label, listed, task_of, varying
from sweeps.finding import between, by_task
from sweeps.plots import blank, folded, padded
from sweeps.table import COLORS, GREY, Row, number

TITLES = {  # of axes, with their units
    "line": "",
    "temperature.tau": "temperature τ", "alpha.peak": "share of distillation, α", "truncation.k": "k, tokens kept",
    "truncation.p": "p, probability kept", "truncation.draws": "tokens drawn per position",
    "lr.peak": "peak of the learning rate", "trainer.steps": "tokens trained on",
    "student.size": "student, parameters without embeddings", "teacher.size": "teacher, parameters without embeddings",
}  # fmt: skip
LOW, HIGH = (59, 120, 216), (217, 119, 47)  # better and worse, as in the other plots

Value = float | str | None


class Plot(NamedTuple):
    """A plot, what it is of, and what can be seen in it."""

    figure: go.Figure
    title: str
    says: str
    width: int = 0  # pixels that it needs


def axes(groups: list[Group]) -> list[str]:
    """Settings that vary, but for those that one before them tells."""
    found: dict[str, list[str]] = {}
    for key in varying([group.config for group in groups]):
        column = [json.dumps(group.config.get(key), sort_keys=True) for group in groups]
        if all(len(set(zip(column, other))) > len(set(other)) for other in found.values()):
            found[key] = column
    return list(found)


def value(group: Group, key: str) -> Value:
    """Of a setting: a number where it is one, or stands for one, such as a size."""
    given, result = group.config.get(key), group.results[0]
    if key == "trainer.steps" and "tokens" in result:
        return float(result["tokens"])
    if key in ("student.size", "teacher.size"):
        role = "teacher_" if key == "teacher.size" else ""
        return float(result.get(f"{role}non_embedding") or result.get(f"{role}parameters") or 0) or given
    if given is None or type(given) is str:
        return given
    return float(given) if type(given) in (int, float) else json.dumps(given)


def word(group: Group, key: str) -> str:
    """The value as people say it: 1m, 0.5, wsd."""
    given, result = group.config.get(key), group.results[0]
    if key == "trainer.steps" and "tokens" in result:
        return amount(result["tokens"])
    return "–" if given is None else f"{given:g}" if type(given) is float else str(given)


def ordered(rows: list[Row], key: str) -> list[str]:
    """The values of a setting: numbers by size, names by the mean loss with them."""
    losses: dict[str, list[float]] = {}
    numbers = {}
    for row in rows:
        losses.setdefault(word(row.group, key), []).append(row.group.mean().mean)
        numbers[word(row.group, key)] = value(row.group, key)
    if all(type(n) is float for n in numbers.values()):
        return sorted(losses, key=numbers.get)
    return sorted(losses, key=lambda w: fmean(losses[w]))


def standing(rows: list[Row]) -> str:
    """How many of these rows are better than language modelling alone, and how sure that is."""
    changes = [row.change for row in rows if row.change]
    if not changes:
        return ""
    if all(change.half is None for change in changes):
        lower = sum(change.mean < 0 for change in changes)
        return f"{lower} of {len(changes)} are lower than {ALONE}, with 1 seed, which gives no error bar"
    sure = [change for change in changes if change.sure]
    worse, better = sum(c.mean > 0 for c in sure), sum(c.mean < 0 for c in sure)
    says = f"{better} of {len(changes)} are better than {ALONE} beyond noise, {worse} worse"
    single = sum(change.half is None for change in changes)
    within = len(changes) - len(sure) - single
    says += f", and {within} within noise" if within else ""
    return f"{says}; {single} with 1 seed give no error bar" if single else says


def lowest(rows: list[Row]) -> Row:
    """The best row: by the paired difference where all have one, since their seeds may differ."""
    paired = all(row.change for row in rows)
    return min(rows, key=lambda row: row.change.mean if paired else row.group.mean().mean)


def tied(best: Row, rows: Iterable[Row]) -> list[Row]:
    """The others that cannot be told apart from the best."""
    return [r for r in rows if r is not best and (d := difference(r.group, best.group)) and d.noise]


def by_task_of(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group.task, []).append(row)
    return found


def firsts(rows: list[Row]) -> str:
    """Which rows have the lowest loss of their tasks, where there are several and no baselines to compare with."""
    tasks = by_task([row.group for row in rows])
    return between(tasks, LOSS) if len(tasks) > 1 and not all(row.change for row in rows) else ""


def sentence(*parts: str) -> str:
    says = "; ".join(filter(None, parts)) + "."
    return says[0].upper() + says[1:]


def taught(table: list[Row]) -> list[Row]:
    """The distilled rows; of a sweep without any, all rows, compared to nothing."""
    return [row for row in table if row.group.distilled] or [row._replace(base=None, change=None) for row in table]


def heat(table: list[Row]) -> Plot | None:
    """Two axes that are crossed: the paired difference to language modelling alone, or the loss where there is none."""
    rows = taught(table)
    keys = axes([row.group for row in rows])
    if len(keys) != 2 or any(row.group.config.get(key) is None for row in rows for key in keys):
        return None
    down, across = sorted(keys, key=lambda key: -len(ordered(rows, key)))
    x, y = ordered(rows, across), ordered(rows, down)
    cells = {(word(row.group, across), word(row.group, down)): row for row in rows}
    if len(cells) < len(x) + len(y):  # no more than a cross: nothing is crossed
        return None
    paired = all(row.change for row in rows)
    best = lowest(rows)
    tasks = by_task_of(rows)  # across which losses cannot be compared
    bests = {task: lowest(some) for task, some in tasks.items()}
    alike = [row.group.label for row in rows if row.change.noise] if paired else [
        row.group.label for task, some in tasks.items() for row in tied(bests[task], some)]  # fmt: skip
    plot = blank(66 * len(y) + 130, margin={"l": 10, "r": 10, "t": 8, "b": 92}, dragmode=False)
    levels = {task: best.group.mean().mean for task, best in bests.items()} if len(tasks) > 1 else {}
    grid = [[shown(cells.get((i, j)), paired, levels) for i in x] for j in y]
    known = [z for line in grid for z in line if z is not None]
    furthest = max(map(abs, known)) or 1
    plot.add_heatmap(
        z=grid, x=list(range(len(x))), y=list(range(len(y))), hoverinfo="skip", xgap=2, ygap=2,
        colorscale=[[0, rgba(LOW, 0.8)], [0.5, rgba(LOW, 0)], [0.5, rgba(HIGH, 0)], [1, rgba(HIGH, 0.8)]] if paired
        else [[0, rgba(LOW, 0.8)], [1, rgba(LOW, 0.05)]],
        zmin=-furthest if paired else min(known), zmax=furthest if paired else max(known),
        colorbar={"orientation": "h", "thickness": 8, "len": 0.7, "y": 0, "yref": "container", "yanchor": "bottom",
                  "nticks": 4, "tickangle": 0, "outlinewidth": 0},
    )  # fmt: skip
    for (i, across_at), (j, down_at) in product(enumerate(x), enumerate(y)):
        row = cells.get((across_at, down_at))
        text = cell(row, paired, bool(row) and row.group.label in alike)
        plot.add_annotation(x=i, y=j, text=text, showarrow=False, font={"size": 13})
        if row and row.group.label in alike:
            plot.add_shape(type="rect", x0=i - 0.46, x1=i + 0.46, y0=j - 0.43, y1=j + 0.43,
                           line={"color": GREY, "width": 1.6, "dash": "dot"})  # fmt: skip
    for axis, key, words in ((plot.update_xaxes, across, x), (plot.update_yaxes, down, y)):
        axis(title=titled(short(key)), tickvals=list(range(len(words))), ticks="",
             ticktext=[folded(w, 18) for w in words], fixedrange=True, showgrid=False, zeroline=False,
             automargin=True, tickangle=0)  # fmt: skip
    plot.update_yaxes(range=[len(y) - 0.5, -0.5])
    mean = best.change.mean if paired else best.group.mean().mean
    says = f"Lowest with {best.group.label}, {number(mean, 4, paired)} nats per token"
    if not paired and len(tasks) > 1:
        says = (
            f"{firsts(rows)}; colours are of the loss above the lowest of the same {task_of([r.group for r in rows])}"
        )
    dotted = "no cell is" if not alike else "a dotted frame and ≈ mark cells"
    within = (
        f"{dotted} within noise of {ALONE if paired else 'that lowest' if len(tasks) > 1 else 'the lowest'}"
        if best.group.mean().half
        else ""
    )
    missing = len(x) * len(y) - len(cells)
    absent = f"{missing} cell{'s' * (missing > 1)} without a finished run" if missing else ""
    return Plot(plot, unit(paired), sentence(says, standing(rows), within, absent), 88 * (len(x) + 1))


def unit(paired: bool) -> str:
    return f"difference to {ALONE}, nats per token" if paired else "loss, nats per token"


def titled(text: str) -> dict:
    return {"text": escape(text), "standoff": 6, "font": {"size": 13}}


def rgba(color: tuple[int, int, int], share: float) -> str:
    return f"rgba({', '.join(map(str, color))}, {share})"


def shown(row: Row | None, paired: bool, levels: dict[str, float]) -> float | None:
    """What gives a cell its colour; levels: the lowest losses of tasks, where these differ."""
    if row is None or paired:
        return row and row.change.mean
    return row.group.mean().mean - levels.get(row.group.task, 0.0)


def cell(row: Row | None, paired: bool, alike: bool) -> str:
    """What stands in a cell."""
    if row is None:
        return "–"
    mean = row.change if paired else row.group.mean()
    half = f'<br><span style="font-size:11px">± {number(mean.half)}</span>' if mean.half is not None else ""
    return f"{'≈ ' if alike else ''}{number(mean.mean, 4, paired)}{half}"


def over(table: list[Row]) -> list[Plot]:
    """A plot of the loss for each numeric axis with three values or more at the same other settings."""
    rows = taught(table)
    keys, made = axes([row.group for row in rows]), []
    for key in keys:
        # A setting of another choice, such as temperature.tau of normkd, is not on this axis but beside it.
        on = [row for row in rows if type(value(row.group, key)) is float]
        off = [row for row in rows if value(row.group, key) is None]
        series: dict[str, list[Row]] = {}
        for row in sorted(on, key=lambda row: value(row.group, key)):
            series.setdefault(label(row.group.config, [k for k in keys if k != key]), []).append(row)
        if len(series) <= 6 and any(len(line) > 2 for line in series.values()):
            made.append(Plot(lines(key, series, off if len(off) <= 4 else []), key, trend(key, series)))
    return made


def lines(key: str, series: dict[str, list[Row]], beside: list[Row]) -> go.Figure:
    """Loss over one axis, a line per series; others and language modelling alone as levels."""
    every = [row for line in series.values() for row in line]
    several, bases = len(series) > 1, based(key, every)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.18, "yanchor": "top"}
    plot = blank(430, margin={"l": 10, "r": 16, "t": 14, "b": 10}, hovermode="closest", legend=legend)
    for (name, line), color in zip(series.items(), COLORS):
        means, kind = [row.group.mean() for row in line], ALONE if line[0].group.alone else "distilled"
        marks = [color if several else row.color for row in line]
        plot.add_scatter(
            x=[value(row.group, key) for row in line], y=[m.mean for m in means], mode="lines+markers",
            name=escape(name or kind), line={"color": color if several else GREY, "width": 2},
            marker={"size": 9, "color": marks}, text=[folded(row.group.label) for row in line],
            error_y={"array": [m.half or 0 for m in means], "thickness": 1.4, "width": 4,
                     "color": color if several else GREY},
            hovertemplate="<b>%{text}</b><br>%{y:.4f}<extra></extra>",
        )  # fmt: skip
    ends = [min(value(r.group, key) for r in every), max(value(r.group, key) for r in every)]
    levels = [(row.group, row.color, "dot", row.group.label) for row in beside]
    if len({id(group) for group in bases.values()}) == 1:
        levels.append((next(iter(bases.values())), GREY, "dash", ALONE))
    elif bases:
        means = [group.mean() for group in bases.values()]
        plot.add_scatter(
            x=list(bases), y=[m.mean for m in means], mode="lines+markers", name=ALONE,
            line={"color": GREY, "width": 2, "dash": "dash"}, marker={"size": 8, "color": GREY},
            error_y={"array": [m.half or 0 for m in means], "color": GREY, "thickness": 1.4, "width": 4},
            hovertemplate=f"<b>{ALONE}</b><br>%{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    for group, color, dash, name in levels:
        mean = group.mean()
        plot.add_scatter(
            x=ends, y=[mean.mean] * 2, mode="lines", name=escape(name), line={"color": color, "width": 2, "dash": dash},
            hovertemplate=f"<b>{folded(name)}</b><br>%{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        if mean.half:
            plot.add_hrect(mean.mean - mean.half, mean.mean + mean.half, fillcolor=color, opacity=0.1, line_width=0)
    ticks = {value(row.group, key): word(row.group, key) for row in every}
    place = scale(ends)
    plot.update_xaxes(title=titled(TITLES.get(key, key)), zeroline=False, automargin=True)
    if len(ticks) <= 10:
        plot.update_xaxes(tickvals=list(ticks), ticktext=[escape(t) for t in ticks.values()], tickangle=0)
    plot.update_xaxes(type="log" if place is math.log10 else "linear", range=padded(map(place, ends)))
    plot.update_yaxes(title=titled("loss, nats per token"), zeroline=False, automargin=True, nticks=7)
    return plot.update_layout(showlegend=True)


def scale(values: list[float]) -> Callable[[float], float]:
    """Logarithmic where the values span more than a factor of 8."""
    return math.log10 if min(values) > 0 and max(values) / min(values) > 8 else float


def based(key: str, rows: list[Row]) -> dict[float, Group]:
    """What the rows at each value are compared to; nothing where rows at one value differ in it."""
    found: dict[float, Group] = {}
    for row in rows:
        if row.base is None or found.setdefault(value(row.group, key), row.base) is not row.base:
            return {}
    return found


def trend(key: str, series: dict[str, list[Row]]) -> str:
    """Where the loss is lowest, or, where what it is compared to changes on the way, how the difference changes."""
    line = max(series.values(), key=len)
    every = [row for rows in series.values() for row in rows]
    if len({id(row.base) for row in line}) > 1 and all(row.change for row in line):
        ends = [f"{number(r.change.mean, 4, True)}{plus(r.change.half)} at {word(r.group, key)}" for r in
                (line[0], line[-1])]  # fmt: skip
        return sentence(f"The difference to {ALONE} goes from {ends[0]} to {ends[1]} nats per token", standing(every))
    if said := firsts(every):
        return sentence(said, standing(every))
    best = lowest(every)
    own = next(rows for rows in series.values() if best in rows)
    mean, on_par = best.group.mean(), tied(best, own)
    at = listed([label(row.group.config, [key]) for row in on_par])
    where = best.group.label if len(series) > 1 else label(best.group.config, [key])
    says = f"Lowest at {where}: {number(mean.mean)}{plus(mean.half)} nats per token"
    return sentence(says, f"{at} cannot be told apart from it" if at else "", standing(every))


def plus(half: float | None) -> str:
    return "" if half is None else f" ± {number(half)}"


def plots(table: list[Row]) -> dict[str, list[Plot]]:
    """All plots of the axes, by kind; the best row of the table first."""
    return {"over": over(table), "heat": [*filter(None, [heat(table)])], "parallel": [*filter(None, [parallel(table)])]}


def parallel(table: list[Row]) -> Plot | None:
    """Parallel coordinates of three axes or more: a line per row of the table, blue where the loss is low.

    Drawn as SVG: plotly's own are WebGL made by eval, which the page forbids.
    """
    rows = taught(table)
    keys = axes([row.group for row in rows])
    if len(keys) < 3:
        return None
    heights = [places(rows, key) for key in keys]
    losses = [row.group.mean().mean for row in rows]
    low, high = min(losses), max(losses)
    shares = [(loss - low) / (high - low or 1) for loss in losses]
    at = [[height[i] for height, _ in heights] + [0.02 + 0.96 * shares[i]] for i in range(len(rows))]
    longest = max(len(part) for said in heights[0][1] for part in folded(said, 14).split("<br>"))
    plot = blank(
        430, margin={"l": max(64, 7 * longest + 12), "r": 70, "t": 46, "b": 16}, dragmode=False, hovermode="closest"
    )
    for row, y, share in reversed(list(zip(rows, at, shares))):  # the lowest on top
        loss = row.group.mean()
        plot.add_scatter(
            x=list(range(len(y))), y=y, mode="lines", line={"color": blended(share), "width": 2.2, "shape": "spline",
            "smoothing": 0.5}, hovertemplate=f"<b>{folded(row.group.label, 40)}</b><br>{number(loss.mean)}"
            f"{plus(loss.half)}<extra></extra>",
        )  # fmt: skip
    for i, title in enumerate([*map(short, keys), "loss, nats per token"]):
        plot.add_vline(i, line={"color": GREY, "width": 1.2}, layer="below")
        plot.add_annotation(x=i, y=1, yref="paper", yanchor="bottom", yshift=6, text=f"<b>{folded(title, 17)}</b>",
                            showarrow=False, font={"size": 12})  # fmt: skip
    ticks = [(i, y, said, "right") for i, (_, marks) in enumerate(heights) for said, y in marks.items()]
    ticks += [(len(keys), 0.02 + 0.96 * share, number(low + share * (high - low), 3), "left") for share in (0, 0.5, 1)]
    for i, y, said, side in ticks:
        plot.add_annotation(x=i, y=y, text=folded(said, 14), showarrow=False, xanchor=side, font={"size": 12},
                            xshift=-5 if side == "right" else 5, bgcolor="rgba(255, 255, 255, 0.8)")  # fmt: skip
    plot.update_xaxes(visible=False, range=[-0.05, len(keys) + 0.05], fixedrange=True)
    plot.update_yaxes(visible=False, range=[0, 1], fixedrange=True)
    plot.update_layout(showlegend=False)
    return Plot(plot, "All axes at once", common(rows, keys), 116 * (len(keys) + 1))


def short(key: str) -> str:
    axis, _, name = key.rpartition(".")
    return "tokens" if key == "trainer.steps" else axis if name == "size" else TITLES.get(key, key)


def places(rows: list[Row], key: str) -> tuple[list[float], dict[str, float]]:
    """Height of each row on an axis, in [0, 1], and that of each value; rows with one value lie side by side."""
    words = ordered(rows, key)
    numbers = [value(row.group, key) for row in rows]
    if len(words) > 8 and all(type(n) is float for n in numbers):
        place = scale(numbers)
        low, high = (place(end(numbers)) for end in (min, max))
        return [0.02 + 0.96 * (place(n) - low) / (high - low) for n in numbers], {words[0]: 0.02, words[-1]: 0.98}
    middle = {w: (i + 0.5) / len(words) for i, w in enumerate(words)}
    heights = [0.0] * len(rows)
    for w in words:
        some = [i for i, row in enumerate(rows) if word(row.group, key) == w]
        for nth, i in enumerate(some):
            heights[i] = middle[w] + 0.6 / len(words) * ((nth + 0.5) / len(some) - 0.5)
    return heights, middle


def blended(share: float) -> str:
    """From blue at 0 through grey to orange at 1."""
    grey = (150, 154, 162)
    a, b, part = (LOW, grey, 2 * share) if share < 0.5 else (grey, HIGH, 2 * share - 1)
    return f"rgb({', '.join(str(round(x + (y - x) * part)) for x, y in zip(a, b))})"


def common(rows: list[Row], keys: list[str]) -> str:
    """What most of the best quarter of the rows share, where their losses can be compared."""
    if said := firsts(rows):
        return sentence(said, standing(rows))
    best = rows[: max(2, math.ceil(len(rows) / 4))]
    often = Counter(filter(None, (label(row.group.config, [key]) for row in best for key in keys))).most_common()
    same = [said for said, times in often if times == often[0][1]]
    return sentence(
        f"{often[0][1]} of the {len(best)} lowest of {len(rows)} have {' or '.join(same)}" if often[0][1] < len(best)
        else f"All of the {len(best)} lowest of {len(rows)} have {listed(same)}",
        f"the lowest is {rows[0].group.label}, {number(rows[0].group.mean().mean)} nats per token", standing(rows),
    )  # fmt: skip

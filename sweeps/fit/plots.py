"""Fitted laws as plots, and the page that holds them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape
from statistics import fmean

import numpy as np
import plotly.graph_objects as go

from sweeps import laws
from sweeps.answers import Answers, Fit, published
from sweeps.compare import amount, interval, listed
from sweeps.contest import SCENARIOS, Contest, contests, teachers
from sweeps.plots import blank, padded, switch
from sweeps.points import Point
from sweeps.report import render
from sweeps.table import COLORS, GREY

ALONE, TAUGHT = "#3b78d8", "#d9772f"
HEAT = ("#3e4fb0", "#2f8fb5", "#3fa572", "#b0a02f", "#d9772f", "#c2344c")  # cold is little compute
LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
MEANINGS = {
    "E": "loss that neither more parameters nor more text would take away, nats per token",
    "A": "what a lack of parameters costs, at one parameter", "B": "what a lack of text costs, at one token",
    "C": "what a lack costs, at 1 on the axis", "alpha": "how fast more parameters help",
    "beta": "how fast more text helps", "gamma": "exponent of both together", "kappa": "how fast more helps",
    "c0": "how the student's distance to its teacher depends on the teacher's loss",
    "d1": "teacher's loss, over that of the student alone, at which the gap in capacity opens",
    "c1": "how strong the gap is", "f1": "how gradually it opens",
}  # fmt: skip


def axes(plot: go.Figure, x: str, y: str, log: bool = True) -> go.Figure:
    """Titles with units, and ticks that do not crowd a narrow window."""
    kind = {"type": "log", "dtick": "D2", "exponentformat": "B"} if log else {}
    small = {"font": {"size": 13}, "standoff": 6}
    plot.update_xaxes(title={"text": x, **small}, zeroline=False, automargin=True, nticks=6, **kind)
    plot.update_yaxes(title={"text": y, **small}, zeroline=False, automargin=True, nticks=8)
    return plot


def canvas(height: int, buttons: bool = False, **layout) -> go.Figure:
    margin = {"l": 10, "r": 16, "t": 54 if buttons else 14, "b": 10}
    return blank(height, margin=margin, legend=LEGEND, hovermode="closest", **layout)


def agreement(fits: list[Fit]) -> go.Figure:
    """Predicted against measured loss: filled runs were fitted, hollow ones were not."""
    plot = canvas(480)
    seen = [x for fit in fits for p, e in zip(fit.points, fit.errors) for x in (p.loss, p.loss * math.exp(e))]
    ends = padded(seen)
    plot.add_shape(type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1], line={"color": GREY, "width": 1.4})
    for fit, color in zip(fits, (ALONE, TAUGHT)):
        for out, said in ((False, "fitted"), (True, "held out")):
            rows = [i for i in range(len(fit.points)) if bool(fit.held[i]) is out]
            some = [fit.points[i] for i in rows]
            if some:
                plot.add_scatter(
                    x=[p.loss for p in some], y=[p.loss * math.exp(fit.errors[i]) for p, i in zip(some, rows)],
                    mode="markers", name=f"{fit.law.name}, {said}", text=[about(p) for p in some],
                    marker=dot(color, out),
                    hovertemplate="%{text}<br>measured %{x:.4f}, predicted %{y:.4f}<extra></extra>",
                )  # fmt: skip
    plot = axes(plot, "measured loss, nats per token", "predicted loss, nats per token", log=False)
    plot.update_xaxes(range=ends)
    plot.update_yaxes(range=ends)
    return plot


def dot(color: str, hollow: bool) -> dict:
    """How a run is drawn: hollow where it was held out."""
    return {"color": color, "size": 9, "symbol": "circle-open" if hollow else "circle", "line": {"width": 2 * hollow}}


def about(p: Point) -> str:
    taught = f", teacher {escape(p.teacher)} ({p.teacher_loss:.3f})" if p.teacher else ""
    return f"<b>N = {amount(p.parameters)}, D = {amount(p.tokens)}</b>{taught}<br>{p.compute:.2e} FLOPs"


def flops_per_token(points: list[Point]) -> Callable[[np.ndarray], np.ndarray]:
    """Forward FLOPs per token over parameters: between the sizes that were run in a straight line of logarithms."""
    known = sorted({(p.parameters, p.flops_per_token) for p in points})
    n, per = np.log([x for x, _ in known]), np.log([f / x for x, f in known])
    return lambda size: size * np.exp(np.interp(np.log(size), n, per))


def budgets(points: list[Point]) -> np.ndarray:
    """Up to six amounts of compute across those that were spent, a factor of at least 1.5 apart."""
    low, high = min(p.compute for p in points), max(p.compute for p in points)
    return np.geomspace(low, high, int(np.clip(math.log(high / low, 1.5) + 1, 1, 6)))


def isoflop(found: Answers) -> tuple[go.Figure, str]:
    """Loss of language modelling over size at equal compute, and what is the best size of most compute."""
    fit, plot = found.supervised, canvas(470)
    sizes = sorted({p.parameters for p in fit.points})
    grid, flops = np.geomspace(sizes[0] / 1.6, sizes[-1] * 1.6, 200), flops_per_token(fit.points)
    levels, says = budgets(fit.points), ""
    colors = [HEAT[round(i * (len(HEAT) - 1) / max(1, len(levels) - 1))] for i in range(len(levels))]
    for budget, color in zip(levels, colors):
        loss = laws.supervised(fit.coefficients, grid, budget / (3 * flops(grid)))
        best = int(loss.argmin())
        plot.add_scatter(
            x=grid, y=loss, mode="lines", name=f"{budget:.1e} FLOPs", line={"color": color, "width": 2},
            hovertemplate=f"<b>{budget:.1e} FLOPs</b><br>%{{y:.4f}} at N = %{{x:.3s}}<extra></extra>",
        )  # fmt: skip
        tokens = budget / (3 * float(flops(grid[best])))
        if 0 < best < len(grid) - 1:
            plot.add_scatter(
                x=[grid[best]], y=[loss[best]], mode="markers", showlegend=False,
                marker={"symbol": "star", "size": 13, "color": color},
                hovertemplate=f"<b>best at {budget:.1e} FLOPs</b><br>N = {amount(grid[best])}, D = {amount(tokens)}, "
                f"{tokens / grid[best]:.3g} tokens per parameter<extra></extra>",
            )  # fmt: skip
            says = (
                f"for {budget:.1e} FLOPs the best size is {amount(grid[best])} parameters, trained on {amount(tokens)} "
                f"tokens, {tokens / grid[best]:.2g} per parameter"
            )
        else:
            end = "smallest" if best == 0 else "largest"
            says = f"for {budget:.1e} FLOPs the {end} size shown is the best, so the best size is not within this sweep"
    nearest = [int(np.abs(np.log(levels / p.compute)).argmin()) for p in fit.points]
    plot.add_scatter(
        x=[p.parameters for p in fit.points], y=[p.loss for p in fit.points], mode="markers", showlegend=False,
        marker={"color": [colors[i] for i in nearest], "size": 8}, text=[about(p) for p in fit.points],
        hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
    )  # fmt: skip
    low, high = min(p.loss for p in fit.points), max(p.loss for p in fit.points)
    plot = axes(plot, "N: parameters without embeddings", "loss, nats per token")
    plot.update_yaxes(range=padded([low, high]))
    return plot, says


def students(found: Answers) -> go.Figure:
    """Loss over the student's size, a line per teacher and one for language modelling alone; buttons for D."""
    fit, alone, among = found.distillation, found.supervised, teachers(found.taught)
    often = [d for d, _ in Counter(p.tokens for p in found.taught).most_common(4)]
    choices = sorted(often)
    plot = canvas(500, buttons=len(choices) > 1)
    sizes = sorted({p.parameters for p in found.points})
    grid, groups, ranges = np.geomspace(sizes[0] / 1.3, sizes[-1] * 1.3, 80), [], []
    for at, tokens in enumerate(choices):
        first, shown = len(plot.data), at == len(choices) - 1
        own = laws.supervised(alone.coefficients, grid, tokens)
        series = [("language modelling alone", own, found.alone, GREY, "dash")]
        for teacher, color in zip(among, (*COLORS, *(GREY for _ in among))):
            loss = laws.distilled(fit.coefficients, grid, tokens, teacher.loss, own)
            with_it = [p for p in found.taught if p.teacher == teacher.label]
            series.append((f"teacher {teacher.label}, loss {teacher.loss:.3f}", loss, with_it, color, "solid"))
        for name, loss, points, color, dash in series:
            points = [p for p in points if p.tokens == tokens]
            plot.add_scatter(
                x=grid, y=loss, mode="lines", name=escape(name), legendgroup=name, visible=shown,
                line={"color": color, "width": 2, "dash": dash},
                hovertemplate=f"<b>{escape(name)}</b><br>%{{y:.4f}} at N = %{{x:.3s}}<extra></extra>",
            )  # fmt: skip
            plot.add_scatter(
                x=[p.parameters for p in points], y=[p.loss for p in points], mode="markers", legendgroup=name,
                showlegend=False, visible=shown, marker={"color": color, "size": 9}, text=[about(p) for p in points],
                hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
            )  # fmt: skip
        groups.append((first, len(plot.data)))
        ranges.append(padded([*(p.loss for p in found.points if p.tokens == tokens), *own[10:-10]]))
    if len(choices) > 1:
        plot.update_layout(updatemenus=chosen([f"D = {amount(d)}" for d in choices], groups, ranges, len(choices) - 1))
    plot = axes(plot, "student: parameters without embeddings", "loss, nats per token")
    plot.update_yaxes(range=ranges[-1])
    return plot


def chosen(labels: list[str], groups: list[tuple[int, int]], ranges: list[list[float]], active: int) -> list[dict]:
    """Buttons that show one group of traces each, in its own range of y."""
    count, choices = groups[-1][1], {}
    for label, (first, last), range_ in zip(labels, groups, ranges):
        choices[label] = [{"visible": [first <= i < last for i in range(count)]}, {"yaxis.range": range_}]
    (menu,) = switch(8, choices, "update")
    return [menu | {"active": active}]


def winners(found: Answers, made: list[Contest]) -> go.Figure:
    """What distillation gains at equal FLOPs, a line per student; buttons for what of the teacher counts."""
    plot = canvas(520, buttons=True)
    sizes, groups, ranges = sorted({c.parameters for c in made}), [], []
    seen = [gain for size in sizes for _, gain in measured(found, size)]
    for scenario in SCENARIOS:
        first = len(plot.data)
        for size, color in zip(sizes, (*COLORS, *(GREY for _ in sizes))):
            (of,) = [c for c in made if c.parameters == size and c.scenario == scenario]
            sure, beyond = (of.low > 0) | (of.high < 0), of.compute > of.measured
            name, says = f"student of {amount(size)}", "%{y:+.4f} nats at %{x:.2e} FLOPs"
            for where, dash, what in (
                (beyond, "dot", ", extrapolated"),
                (~beyond, "dash", ""),
                (sure & ~beyond, "solid", ""),
            ):
                plot.add_scatter(
                    x=of.compute, y=np.where(where, of.gain, np.nan), mode="lines", name=name, legendgroup=name,
                    showlegend=dash == "solid", visible=scenario == SCENARIOS[0],
                    line={"color": color, "width": 2.2, "dash": dash},
                    hovertemplate=f"<b>{name}{what}</b><br>{says}<extra></extra>",
                )  # fmt: skip
            pairs = measured(found, size) if scenario == SCENARIOS[0] else []
            plot.add_scatter(
                x=[c for c, _ in pairs], y=[g for _, g in pairs], mode="markers", legendgroup=name, showlegend=False,
                visible=scenario == SCENARIOS[0], marker={"color": color, "size": 9},
                hovertemplate=f"<b>{name}, measured</b><br>{says}<extra></extra>",
            )  # fmt: skip
        groups.append((first, len(plot.data)))
        # Where nearly all goes to the teacher, the student learns next to nothing: that would take all of the height.
        gains = np.concatenate([c.gain for c in made if c.scenario == scenario] + [[0.0, *seen]])
        high, low = max(float(np.nanmax(gains)), 0.01), float(np.nanmin(gains))
        ranges.append(padded([max(low, -1.5 * high), high]))
    plot.add_hline(0, line={"color": GREY, "width": 1.4})
    labels = ["free teacher", "+ inference", "+ training", "+ both"]
    plot.update_layout(updatemenus=chosen(labels, groups, ranges, 0))
    plot = axes(plot, "FLOPs", "gain over language modelling, nats")
    plot.update_yaxes(range=ranges[0])
    plot.update_xaxes(exponentformat="power", dtick=1)
    return plot


def measured(found: Answers, size: float) -> list[tuple[float, float]]:
    """Compute, and mean loss alone - mean loss with the best teacher, at each D that both were run with."""
    pairs = []
    for tokens in sorted({p.tokens for p in found.taught if p.parameters == size}):
        alone = [p for p in found.alone if (p.parameters, p.tokens) == (size, tokens)]
        here = [p for p in found.taught if (p.parameters, p.tokens) == (size, tokens)]
        means = [fmean(p.loss for p in here if p.teacher == t) for t in {p.teacher for p in here}]
        if alone and means:
            pairs.append((alone[0].compute, fmean(p.loss for p in alone) - min(means)))
    return pairs


def best_measured(found: Answers) -> str:
    """What the best teacher does for a student with the most tokens that it was also trained with alone."""
    pairs = {(p.parameters, p.tokens) for p in found.alone} & {(p.parameters, p.tokens) for p in found.taught}
    if not pairs:
        return ""
    size, tokens = max(pairs, key=lambda pair: (pair[1], -pair[0]))
    losses = {
        t.label: fmean(here)
        for t in teachers(found.taught)
        if (here := [p.loss for p in found.taught if (p.parameters, p.tokens, p.teacher) == (size, tokens, t.label)])
    }
    best = min(losses, key=losses.get)
    alone = fmean(p.loss for p in found.alone if (p.parameters, p.tokens) == (size, tokens))
    return (
        f"With {amount(tokens)} tokens a student of {amount(size)} parameters ends at {losses[best]:.3f} with the "
        f"teacher {best}, the best of {len(losses)} for it, and at {alone:.3f} alone."
    )


def most_gained(found: Answers) -> str:
    """Where a free teacher gave most, and what it gave the same student with most compute, as measured."""
    gains = {p.parameters: measured(found, p.parameters) for p in found.taught}
    of = [(gain, size, compute) for size, pairs in gains.items() for compute, gain in pairs]
    if not of:
        return ""
    gain, size, compute = max(of, key=lambda found: abs(found[0]))
    last, at = gains[size][-1][1], gains[size][-1][0]
    return (
        f"Measured, a free teacher changes the loss most for the student of {amount(size)} at {compute:.1e} FLOPs, by "
        f"{-gain:+.3f} nats, and at {at:.1e} FLOPs by {-last:+.3f}."
    )


def last_gains(found: Answers) -> str:
    """What a free teacher gave each student with most compute, seed by seed: whether a crossing was measured at all."""
    words, lost = [], False
    for size in sorted({p.parameters for p in found.taught}):
        both = {p.tokens for p in found.taught if p.parameters == size}
        both &= {p.tokens for p in found.alone if p.parameters == size}
        if not both:
            continue
        here = [p for p in found.points if (p.parameters, p.tokens) == (size, max(both))]
        alone = {p.seed: p.loss for p in here if p.teacher is None}
        taught: dict[str, dict] = {}
        for p in here:
            if p.teacher is not None:
                taught.setdefault(p.teacher, {})[p.seed] = p.loss
        best = min(taught.values(), key=lambda losses: fmean(losses.values()))
        gain = interval(alone[seed] - best[seed] for seed in alone if seed in best)
        if gain:
            lost = lost or gain.mean <= 0
            noise = f" ± {gain.half:.3f}{', within noise' if gain.noise else ''}" if gain.half is not None else ""
            words.append(f"{gain.mean:+.3f}{noise} (N = {amount(size)}, {here[0].compute:.1e} FLOPs)")
    if not words:
        return ""
    crossing = "" if lost else ": no crossing was measured, and those below are what the laws say"
    return f"With most compute measured, a free teacher gains {listed(words)} nats{crossing}."


def one_axis(axis: str, fit: Fit, entropy: float | None) -> go.Figure:
    """A power law with its 95% band, and its runs."""
    title = {"tokens": "D, tokens", "parameters": "N, without embeddings", "compute": "training FLOPs"}[axis]
    values = np.array([getattr(p, axis) for p in fit.points], float)
    grid, plot = np.geomspace(values.min() / 1.3, values.max() * 4, 80), canvas(300)
    if fit.samples:
        drawn = np.stack([laws.power(c, grid) for c in fit.samples])
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        plot.add_scatter(x=[*grid, *grid[::-1]], y=[*high, *low[::-1]], fill="toself", mode="none", hoverinfo="skip",
                         fillcolor="rgba(59,120,216,0.18)", showlegend=False)  # fmt: skip
    curve = laws.power(fit.coefficients, grid)
    plot.add_scatter(x=grid, y=curve, mode="lines", line={"color": ALONE, "width": 2}, showlegend=False,
                     hovertemplate="%{y:.4f} at %{x:.3s}<extra></extra>")  # fmt: skip
    for out in (False, True):
        rows = np.flatnonzero(fit.held == out)
        plot.add_scatter(
            x=values[rows], y=[fit.points[i].loss for i in rows], mode="markers", showlegend=False,
            marker=dot(ALONE, out),
            text=[about(fit.points[i]) for i in rows], hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
        )  # fmt: skip
    lines = {"E": fit.coefficients["E"]} if fit.coefficients["E"] > curve.min() - 1.5 * np.ptp(curve) else {}
    lines |= {"entropy": entropy} if entropy else {}
    for at, (name, y) in enumerate(lines.items()):
        plot.add_hline(y, line={"color": GREY, "width": 1.4, "dash": "dot" if name == "entropy" else "dash"})
        plot.add_annotation(text=f"{name} {y:.3f}", x=at, xref="paper", xanchor="right" if at else "left", y=y,
                            yanchor="bottom", showarrow=False, font={"size": 12})  # fmt: skip
    plot = axes(plot, title, "loss, nats per token")
    plot.update_yaxes(range=padded([*(p.loss for p in fit.points), *curve[5:], *lines.values()]))
    if axis == "compute":
        plot.update_xaxes(exponentformat="power", dtick=1)
    return plot


def facts(found: Answers) -> dict[str, str]:
    def span(name: str, points: Iterable[Point]) -> str:
        values = sorted({getattr(p, name) for p in points})
        return f"{amount(values[0])} to {amount(values[-1])} ({len(values)})"

    said = {"runs": f"{len(found.alone)} by language modelling, {len(found.taught)} with a teacher",
            "N": span("parameters", found.points), "D": span("tokens", found.points),
            "training FLOPs": f"{sum(p.compute for p in found.points):.2e} of all students"}  # fmt: skip
    if found.taught:
        said["teachers"] = ", ".join(f"{t.label} ({t.loss:.3f})" for t in teachers(found.taught))
    return said


def page(found: Answers, says: str, question: str = "") -> str:
    """The answers as HTML."""
    main, made = [f for f in (found.supervised, found.distillation) if f], contests(found)
    figures, captions = {}, {}
    if main:
        figures["agreement"] = agreement(main)
        off = [f"{f.error:.2%} by the {f.law.name} law on {f.held.sum()} runs (straight line: {f.straight:.2%})"
               for f in main if f.error is not None]  # fmt: skip
        captions["agreement"] = "No run was held out: too few would be left."
        if off:
            captions["agreement"] = f"The largest runs, which the fit had not seen, are missed by {', '.join(off)}."
    if found.supervised:
        figures["isoflop"], best = isoflop(found)
        captions["isoflop"] = f"Language modelling alone at equal compute: {best}."
    if found.distillation:
        figures["students"], captions["students"] = students(found), best_measured(found)
        figures["winners"], captions["winners"] = winners(found, made), f"{most_gained(found)} {last_gains(found)}"
    figures |= {f"power-{axis}": one_axis(axis, fit, found.entropy) for axis, fit in found.powers.items()}
    return render(
        "fit.html", figures, name=found.name, question=question, says=says, facts=facts(found), found=found,
        fits=main, captions=captions, contests=made, scenarios=SCENARIOS, meanings=MEANINGS, published=published,
        warnings=[*found.cannot, *(d for f in main for d in f.doubts), *found.notes], amount=amount,
        predicted=lambda fit, i: fit.points[i].loss * math.exp(fit.errors[i]),
    )  # fmt: skip

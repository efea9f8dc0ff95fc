"""A sweep as one page: python -m sweeps.report NAME writes ROOT/sweeps/NAME.html, which needs no network."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from kd import files
from kd.errors import UserError
from kd.progress import clock
from kd.run import NO_PART, NO_SIGNAL, model_name, read_json

ALONE = "language modelling alone"
NO_ERROR_BAR = "1 seed: no error bar, so a small difference may be chance"
# 97.5% quantile of Student's t for 1 to 30 degrees of freedom; more are given the last one, a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
NEEDED = (("final", "val/lm"), *(("config", k) for k in ("seed", "logits", "data", "student.size", "teacher.size")))
NOUNS = {
    "loss": "losses", "student.size": "students", "teacher.size": "teachers", "truncation": "truncations",
    "temperature.tau": "temperatures", "alpha.peak": "shares of distillation", "lr.peak": "learning rates",
}  # fmt: skip
MEASURES = {  # columns of the table: what they are called and what they mean
    "val/bpb": ("bits per byte", "the loss per byte of text, which can be compared where tokenizers differ"),
    "val/fkl": ("fkl", "KL(teacher || student), nats per token; 0 is a perfect copy of the teacher"),
    "val/rkl": ("rkl", "KL(student || teacher), nats per token"),
    "val/acceptance": ("acceptance", "1 - total variation distance: how often speculative decoding keeps a token"),
    "val/agreement": ("agreement", "share of positions where student and teacher rank the same token first"),
    "val/ece": ("ece", "expected calibration error: mean |confidence - accuracy| over 15 bins; 0 is calibrated"),
}
BETTER = {"val/fkl": "lower is closer to the teacher", "val/acceptance": "higher is closer to the teacher",
          "val/ece": "lower is better calibrated"}  # fmt: skip
COLORS = ("#3b78d8", "#d9772f", "#2a9d78", "#b855a8", "#b0931f", "#cf4a5a", "#4f8fa3", "#8468d0", "#73892f", "#9c664a")
GREY = "#8c929c"


class Interval(NamedTuple):
    """Mean over n seeds and half the width of its 95% interval, None where one seed gives none."""

    mean: float
    half: float | None
    n: int

    @property
    def noise(self) -> bool:
        """Whether 0 is inside."""
        return self.half is not None and abs(self.mean) <= self.half

    @property
    def lower(self) -> bool:
        """Whether all of it is below 0."""
        return self.half is not None and self.mean < -self.half


def interval(values: Iterable[float]) -> Interval | None:
    """Mean and 95% t interval; None of nothing."""
    x = list(values)
    half = T[min(len(x) - 1, len(T)) - 1] * stdev(x) / math.sqrt(len(x)) if len(x) > 1 else None
    return Interval(fmean(x), half, len(x)) if x else None


class Entry(NamedTuple):
    """One line of a sweep's manifest and what became of it."""

    folder: Path
    overrides: list[str]
    state: str  # done, failed, unfinished, missing, damaged
    says: str
    result: dict | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    config: dict
    runs: dict[int, Entry]  # by seed

    @property
    def alone(self) -> bool:
        return self.config["logits"] == "none"

    @property
    def task(self) -> str:
        """Student, data and number of tokens: where these agree, losses can be compared."""
        return subset(self.config, "data", "student", "trainer.steps", "trainer.batch")

    def of(self, measure: str) -> dict[int, float]:
        """A measure of the final validation, by seed."""
        finals = {seed: entry.result["final"] for seed, entry in self.runs.items()}
        return {seed: final[measure] for seed, final in finals.items() if measure in final}

    def mean(self, measure: str = "val/lm") -> Interval | None:
        return interval(self.of(measure).values())

    @property
    def seconds(self) -> float:
        return fmean(entry.result.get("seconds", 0) for entry in self.runs.values())


# ---- reading


def manifest(root: Path, name: str) -> list[dict]:
    """The runs of a sweep as kd.sweep wrote them; raises UserError where there is no such sweep."""
    path, again = root / "sweeps" / f"{name}.json", f"To run it, type: python train.py sweeps={name}"
    try:
        runs = json.loads(path.read_text())["runs"]
        return [{"run": str(line["run"]), "overrides": [str(word) for word in line["overrides"]]} for line in runs]
    except FileNotFoundError:
        there = listed(sorted(p.stem for p in path.parent.glob("*.json"))) or "none yet"
        raise UserError(f"No sweep {name} in {path.parent.resolve()}. There: {there}. {again}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged. {again} (finished runs are not run again)") from None


def read(root: Path, line: dict) -> Entry:
    """What became of a run, whatever is in its folder."""
    folder = root / line["run"]
    state, says, result = "unfinished", "still running, or stopped: the same command goes on with it", None
    try:
        result, failure = read_json(folder / "result.json"), read_json(folder / "failure.json")
        if result is not None:
            state, says = "done", ""
            final = {k: v for k, v in result["final"].items() if isinstance(v, int | float) and math.isfinite(v)}
            if "val/tvd" in final:
                final["val/acceptance"] = 1 - final["val/tvd"]
            result = result | {"final": final}
            for part, key in NEEDED:
                result[part][key]
        elif failure is not None:
            state, says = "failed", str(failure["reason"])
        elif not folder.exists():
            state, says = "missing", "not started yet"
    except UserError as error:
        state, says, result = "damaged", str(error), None
    except (KeyError, TypeError, AttributeError):
        state, says, result = "damaged", f"not what a run writes; to run it anew: rm -r {folder}", None
    return Entry(folder, line["overrides"], state, says, result)


def curve(group: Group) -> list[tuple[float, ...]]:
    """Tokens, FLOPs and mean loss on held-out text, at the steps that all seeds have."""
    found = []
    for entry in group.runs.values():
        path, steps = entry.folder / "metrics.jsonl", {}
        for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
                steps[line["step"]] = [float(line[axis]) for axis in ("tokens", "flops", "val/lm")]
            except (ValueError, KeyError, TypeError):  # a line about training, or torn by a kill
                continue
        found += [steps] if steps else []
    common = sorted(set.intersection(*map(set, found))) if found else []
    return [tuple(map(fmean, zip(*(steps[s] for steps in found)))) for s in common]


# ---- grouping


def settings(config: dict) -> dict:
    """What a run's outcome depends on, but for the seed."""
    drop = ("seed", *NO_PART, *(NO_SIGNAL if config["logits"] == "none" else ()))
    return {k: v for k, v in config.items() if not any(k == d or k.startswith(f"{d}.") for d in drop)}


def subset(config: dict, *prefixes: str) -> str:
    """The settings below prefixes, as text that can be compared."""
    part = {k: v for k, v in config.items() if any(k == p or k.startswith(f"{p}.") for p in prefixes)}
    return json.dumps(part, sort_keys=True)


def varying(configs: list[dict]) -> list[str]:
    """Settings that tell configs apart, the loss first; loss.mu only where it differs between runs of one loss."""
    keys = []
    for key in dict.fromkeys(k for c in configs for k in c):
        axis = key.partition(".")[0]
        values = {(c.get(axis) if axis != key else None, json.dumps(c.get(key), sort_keys=True)) for c in configs}
        if len(values) > len({choice for choice, _ in values}):
            keys.append(key)
    return sorted(keys, key="loss".__ne__)


def label(config: dict, keys: list[str]) -> str:
    """akl, fkl tau=2, student=1m lr.peak=0.002: what a person would type, made short."""
    words = []
    for key in keys:
        axis, _, name = key.rpartition(".")
        value, sized = config.get(key), name in ("size", "name")
        if key in config and not (value is None and sized):
            said = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
            short = axis if sized else name if axis in ("loss", "truncation", "temperature") else key
            words.append(said if key in ("loss", "truncation") else f"{short}={said}")
    return " ".join(words)


def grouped(entries: list[Entry]) -> list[Group]:
    """Finished runs by what they differ in, the lowest loss first."""
    runs: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        if entry.result is not None:
            config = entry.result["config"]
            runs.setdefault(json.dumps(settings(config)), {})[config["seed"]] = entry
    configs = [json.loads(text) for text in runs]
    keys = {alone: varying([c for c in configs if (c["logits"] == "none") is alone]) for alone in (True, False)}
    groups = []
    for config, by_seed in zip(configs, runs.values()):
        alone = config["logits"] == "none"
        said = label(config, keys[alone])
        name = f"{ALONE} {said}".strip() if alone else said or str(config.get("loss", "distilled"))
        groups.append(Group(name, config, by_seed))
    return sorted(groups, key=lambda g: g.mean().mean)


# ---- comparing


def difference(group: Group, other: Group | None) -> Interval | None:
    """Loss of group - other, seed by seed; None where they share no seed."""
    a, b = group.of("val/lm"), other.of("val/lm") if other else {}
    return interval(a[seed] - b[seed] for seed in a if seed in b)


def baseline(group: Group, groups: list[Group]) -> Group | None:
    """Language modelling alone on the same student, data and tokens, at its best; it shares a seed with group."""
    return next((g for g in groups if g.alone and g.task == group.task and g.runs.keys() & group.runs.keys()), None)


def closed(group: Group, base: Group | None) -> float | None:
    """Share of the gap between language modelling alone and teacher that group closes, over the seeds of both."""
    change, teacher = difference(group, base), group.mean("val/teacher_lm")
    if change is None or teacher is None or group is base:
        return None
    room = on_seeds(base, group) - teacher.mean
    return -change.mean / room if room > 0 else None


def on_seeds(group: Group, other: Group) -> float:
    """Mean loss of group over the seeds that other has too."""
    return fmean(loss for seed, loss in group.of("val/lm").items() if seed in other.runs)


def finding(groups: list[Group]) -> str:
    """What the sweep says, in one line, and how sure that is."""
    rivals = [g for g in groups if not g.alone]
    if rivals and len({g.task for g in groups}) > 1:
        return over_tasks(groups)
    rivals = rivals or groups
    best = rivals[0]
    base = None if best.alone else baseline(best, groups)
    change = difference(best, base)
    digits = 4 if change and abs(change.mean) < 0.005 else 3
    word = "lowest" if change and (change.mean >= 0 or change.noise) else "best"
    opening = f"{best.label}: " if len(rivals) == 1 else f"of {count(rivals)}, {best.label} is {word}: "
    mean = best.mean() if base is None else Interval(on_seeds(best, base), None, change.n)
    opening += f"{mean.mean:.{digits}f} nats per token on held-out text"
    if base is None:
        sure = (
            f" ± {mean.half:.{digits}f} ({mean.n} seeds, 95% interval)"
            if mean.half is not None
            else f" ({NO_ERROR_BAR})"
        )
        return opening + sure + ties(best, rivals) + no_baseline(best, groups)
    against = f" against {on_seeds(base, best):.{digits}f} for {base.label}"
    return opening + against + verdict(best, base, digits) + sure_ones(best, rivals, groups) + ties(best, rivals)


def verdict(best: Group, base: Group, digits: int) -> str:
    """How best and base differ, with the interval or the lack of one."""
    change, share = difference(best, base), closed(best, base)
    gap = f", closing {share:.0%} of the gap to the teacher" if share is not None and share > 0 else ""
    nothing = f": nothing here beats {ALONE}" if change.mean >= 0 else ""
    if change.half is None:
        return f"{nothing or gap} ({NO_ERROR_BAR})"
    size = f"{abs(change.mean):.{digits}f} ± {change.half:.{digits}f}"
    seeds = f"({change.n} seeds, paired, 95% interval)"
    if change.noise:
        return f", a difference of {size} {seeds}, which is within noise{nothing or ': no gain is shown'}"
    return f", {size} {'higher' if nothing else 'lower'} {seeds}{nothing or gap}"


def sure_ones(best: Group, rivals: list[Group], groups: list[Group]) -> str:
    """Groups that beat the baseline beyond noise, where the one with the lowest mean does not."""
    changes = {g.label: difference(g, baseline(g, groups)) for g in rivals}
    sure = [name for name, change in changes.items() if change and change.lower]
    return f"; lower beyond noise: {listed(sure)}" if sure and best.label not in sure else ""


def ties(best: Group, rivals: list[Group]) -> str:
    """Groups whose paired difference to the best may be nothing."""
    tied = [g.label for g in rivals if g is not best and (d := difference(g, best)) and d.noise]
    some = tied if len(tied) <= 3 else [*tied[:2], f"{len(tied) - 2} more"]
    return f"; {listed(some)} cannot be told apart from it" if tied else ""


def no_baseline(group: Group, groups: list[Group]) -> str:
    """What is missing for a comparison with language modelling alone."""
    if group.alone:
        return ""
    if any(g.alone for g in groups):
        return f"; no run by {ALONE} has a seed of it"
    return f"; there is no run by {ALONE} to compare with (logits=none)"


def over_tasks(groups: list[Group]) -> str:
    """The finding where student, data or tokens vary, so that losses are compared within each of these."""
    tasks = [[g for g in groups if g.task == task and not g.alone] for task in {g.task for g in groups}]
    bests = [next((g for g in task if baseline(g, groups)), None) for task in tasks]
    changes = [difference(best, baseline(best, groups)) for best in bests if best]
    if not changes:
        return f"{len(tasks)} settings of student, data and tokens, in none of them a run by {ALONE} to compare with"
    single = sum(c.half is None for c in changes)
    how = f"; beyond noise in {sum(c.lower for c in changes)} (paired over seeds, 95%)" if single < len(changes) else ""
    how += f" ({NO_ERROR_BAR})" if single == len(changes) else f" ({single} with 1 seed)" if single else ""
    return (
        f"in {sum(c.mean < 0 for c in changes)} of {len(changes)} settings of student, data and tokens the best distilled "
        f"student has a lower loss on held-out text than {ALONE}{how}"
    )


def count(groups: list[Group]) -> str:
    """5 losses, or 8 settings where more than the loss varies."""
    keys = varying([g.config for g in groups])
    return f"{len(groups)} {NOUNS.get(keys[0], 'settings') if len(keys) == 1 else 'settings'}"


def listed(words: list[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


# ---- showing


class Row(NamedTuple):
    """A line of the table: a group and what it is compared to."""

    group: Group
    base: Group | None
    change: Interval | None
    closed: float | None
    color: str


class Mark(NamedTuple):
    """What stands beside the students: a teacher, or the lowest loss there can be."""

    label: str
    dash: str
    values: dict[str, float]


def rows(groups: list[Group]) -> list[Row]:
    """The table, best first; colors go to the lowest losses."""
    colors, found = iter(COLORS), []
    for group in groups:
        base = baseline(group, groups)
        color = GREY if group.alone else next(colors, GREY)
        found.append(Row(group, base, difference(group, base), closed(group, base), color))
    return found


def marks(groups: list[Group]) -> list[Mark]:
    """Teachers and, where it is known, the entropy of the data."""
    taught: dict[str, list[Group]] = {}
    for group in groups:
        if group.of("val/teacher_lm"):
            taught.setdefault(subset(group.config, "teacher", "data"), []).append(group)
    keys, found = varying([json.loads(text) for text in taught]), []
    for text, members in taught.items():
        said = label(json.loads(text), keys) or str(model_name(members[0].config, "teacher"))
        seen = {k: [v for g in members for v in g.of(f"val/teacher_{k}").values()] for k in ("lm", "ece")}
        values = {f"val/{k}": fmean(v) for k, v in seen.items() if v}
        found.append(Mark(f"teacher {said.removeprefix('teacher=')}", "solid", values | in_bytes(values, members[0])))
    floors = {entry.result.get("entropy") for g in groups for entry in g.runs.values()} - {None}
    return found + [Mark("entropy of the data", "dot", {"val/lm": floor}) for floor in sorted(floors)]


def in_bytes(values: dict[str, float], group: Group) -> dict[str, float]:
    """The loss in bits per byte, where the data is text."""
    per_token = next(iter(group.runs.values())).result.get("bytes_per_token")
    return {"val/bpb": values["val/lm"] / math.log(2) / per_token} if per_token else {}


def blank(height: int, **layout) -> go.Figure:
    """An empty plot in the style of the page, which adds the colors of text and grid."""
    font = {"family": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", "size": 13}
    style = {"template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": font}
    return go.Figure(layout=go.Layout(height=height, showlegend=False, **style, **layout))


def short(text: str) -> str:
    """A label for a plot: lines of at most 24 characters, and no markup of its own."""
    return "<br>".join(map(escape, textwrap.wrap(text, 24)))


def switch(margin: int, *choices: tuple[str, str, list]) -> list[dict]:
    """Buttons above a plot: title, what plotly is to call, and with what."""
    made = [{"label": title, "method": method, "args": arguments} for title, method, arguments in choices]
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": margin}}
    return [{"type": "buttons", "direction": "right", "buttons": made, **place}]


def dots(table: list[Row], measure: str, beside: Iterable[Mark] = ()) -> go.Figure | None:
    """A measure per group: mean, interval, and every seed; vertical lines for what stands beside. None of nothing."""
    shown = [row for row in table if row.group.of(measure)]
    if not shown:
        return None
    labels = [short(row.group.label) for row in shown]
    tall = 42 if any("<br>" in text for text in labels) else 30
    beside = sorted(beside, key=lambda mark: mark.values[measure])
    top = 14 + 18 * len(beside) + (34 if beside else 0)
    plot = blank(tall * len(shown) + top + 56, margin={"l": 10, "r": 24, "t": top, "b": 46}, dragmode=False)
    for at, row in enumerate(shown):
        seeds, mean = row.group.of(measure), row.group.mean(measure)
        says = f"<b>{labels[at]}</b><br>%{{x:.4f}}"
        faint = {"color": row.color, "size": 7, "opacity": 0.35}
        if len(seeds) > 1:
            text = [f"seed {seed}" for seed in seeds]
            plot.add_scatter(
                x=list(seeds.values()), y=[at] * len(seeds), mode="markers", marker=faint, text=text,
                hovertemplate=f"{says} %{{text}}<extra></extra>",
            )  # fmt: skip
        whisker = {"type": "constant", "value": mean.half or 0, "color": row.color, "thickness": 1.6, "width": 5}
        plot.add_scatter(
            x=[mean.mean], y=[at], error_x=whisker, mode="markers", marker={"color": row.color, "size": 11},
            hovertemplate=says + (f" ± {mean.half:.4f}" if mean.half is not None else "") + "<extra></extra>",
        )  # fmt: skip
    reach = [
        end
        for row in shown
        for m in [row.group.mean(measure)]
        for end in (m.mean - (m.half or 0), m.mean + (m.half or 0))
    ]
    reach += [v for row in shown for v in row.group.of(measure).values()]
    plot.update_yaxes(
        tickvals=list(range(len(shown))), ticktext=labels, range=[len(shown) - 0.5, -0.5], automargin=True,
        showgrid=False, zeroline=False, fixedrange=True, ticklabelstandoff=8,
    )  # fmt: skip
    near, whole = padded(reach), padded(reach + [mark.values[measure] for mark in beside])
    plot.update_xaxes(range=whole, zeroline=False, fixedrange=True, nticks=8)
    for level, mark in enumerate(beside):
        x = mark.values[measure]
        plot.add_shape(
            type="line", x0=x, x1=x, yref="paper", y0=0, y1=1, line={"color": GREY, "width": 1.2, "dash": mark.dash}
        )
        right = x > (whole[0] + whole[1]) / 2
        plot.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", yshift=18 * level, showarrow=False, text=f"{short(mark.label)} {x:.3f}",
            xanchor="right" if right else "left", font={"size": 12},
        )  # fmt: skip
    if beside:
        choices = (
            ("everything", "relayout", [{"xaxis.range": whole}]),
            ("students only", "relayout", [{"xaxis.range": near}]),
        )
        plot.update_layout(updatemenus=switch(18 * len(beside) + 8, *choices))
    return plot


def padded(values: list[float]) -> list[float]:
    """A range with a little room on both sides."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return [low - room, high + room]


def curves(table: list[Row], beside: Iterable[Mark]) -> go.Figure | None:
    """Loss on held-out text against tokens, or FLOPs, a line per group. None where nothing was measured on the way."""
    drawn = [(row, line) for row in table if (line := curve(row.group))]
    if not drawn:
        return None
    plot = blank(480, margin={"l": 56, "r": 12, "t": 54, "b": 50}, hovermode="closest")
    plot.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0})
    for row, line in drawn:
        tokens, _, loss = zip(*line)
        plot.add_scatter(
            x=tokens, y=loss, name=escape(row.group.label), mode="lines+markers", marker={"size": 5},
            line={"color": row.color, "width": 2, "dash": "dash" if row.group.alone else "solid"},
            showlegend=row.group.alone or row.color != GREY,
            hovertemplate=f"<b>{short(row.group.label)}</b><br>%{{y:.4f}} at %{{x:.4s}}<extra></extra>",
        )  # fmt: skip
    for mark in beside:
        y = mark.values["val/lm"]
        plot.add_hline(y=y, line={"color": GREY, "width": 1.2, "dash": mark.dash})
        plot.add_annotation(
            x=1, xref="paper", xanchor="right", y=y, yanchor="bottom", showarrow=False, text=short(mark.label)
        )
    plot.update_yaxes(title="loss, nats per token", zeroline=False)
    plot.update_xaxes(title="tokens", zeroline=False)
    axes = [[list(column) for column in zip(*line)][:2] for _, line in drawn]
    choices = [
        (
            f"against {name}",
            "update",
            [{"x": [axis[i] for axis in axes]}, {"xaxis.title.text": name, "xaxis.autorange": True}],
        )
        for i, name in enumerate(("tokens", "FLOPs"))
    ]
    plot.update_layout(updatemenus=switch(8, *choices))
    return plot


def facts(entries: list[Entry], groups: list[Group]) -> dict[str, str]:
    """What the sweep is made of."""
    results = [entry.result for group in groups for entry in group.runs.values()]

    def said(values: Iterable) -> str:
        return listed(list(dict.fromkeys(str(v) for v in values if v is not None))) or "none"

    def model(role: str, count: str) -> Iterable[str | None]:
        for result in results:
            name, parameters = model_name(result["config"], role), result.get(count)
            yield name and (f"{name} ({parameters:,} parameters)" if parameters else name)

    states = Counter(entry.state for entry in {entry.folder: entry for entry in entries}.values())
    data = (
        " ".join(str(r["config"][k]) for k in ("data", "data.name", "data.files") if r["config"].get(k))
        for r in results
    )
    return {
        "runs": ", ".join(f"{number} {state}" for state, number in states.items()),
        "seeds": said(sorted({r["config"]["seed"] for r in results})),
        "data": said(data),
        "teacher": said(model("teacher", "teacher_parameters")),
        "student": said(model("student", "parameters")),
        "tokens per run": said(f"{r.get('tokens', 0):,}" for r in results),
        "time": f"{clock(sum(r.get('seconds', 0) for r in results))} in all",
        "git": said((r.get("environment") or {}).get("git") or "unknown" for r in results),
    }


def warnings(groups: list[Group]) -> list[str]:
    """Why rows of the table may not be comparable."""
    results, says = [entry.result for group in groups for entry in group.runs.values()], []
    for key in dict.fromkeys(k for r in results for k in r.get("environment") or {}):
        seen = Counter(str((r.get("environment") or {}).get(key) or "unknown") for r in results)
        if len(seen) > 1:
            what = "git revisions: the code may have changed on the way" if key == "git" else f"versions of {key}"
            says.append(f"Runs of different {what} ({', '.join(f'{v}: {n} runs' for v, n in seen.items())}).")
    if any(
        (r.get("environment") or {}).get("git", "").endswith("+")
        for r in results
        if (r.get("environment") or {}).get("git")
    ):
        says.append("Some runs were made with changes that are not committed (git revision with +).")
    data = varying(
        [{k: v for k, v in g.config.items() if k.partition(".")[0] == "data" and k != "data.tokens"} for g in groups]
    )
    if data:
        says.append(
            f"Held-out text differs between runs ({', '.join(data)}): compare losses only where it is the same."
        )
    if len({frozenset(g.runs) for g in groups}) > 1:
        says.append(
            "Not every row has the same seeds: their means differ by chance too; the paired differences do not."
        )
    return says


def page(root: Path, name: str, entries: list[Entry], groups: list[Group], says: str) -> str:
    """The report as HTML; jinja2 escapes whatever comes from files."""
    table, beside = rows(groups), marks(groups)
    alone = [Mark(g.label, "dash", {"val/lm": g.mean().mean}) for g in groups if g.alone]
    near = beside if len(beside) <= 3 else []
    figures = {"loss": dots(table, "val/lm", near + (alone if len(alone) == 1 else [])), "curves": curves(table, near)}
    figures |= {key: dots(table, key) for key in BETTER}
    options = {"displayModeBar": False, "responsive": True}
    plots = {
        key: figure.to_html(full_html=False, include_plotlyjs=False, config=options, div_id=key.replace("/", "-"))
        for key, figure in figures.items()
        if figure
    }
    results = [entry.result for group in groups for entry in group.runs.values()]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "clock": clock,
        "command": lambda words: shlex.join(["python", "train.py", *words]),
    }
    return environment.from_string(Path(__file__).with_suffix(".html").read_text()).render(
        name=name, says=says, facts=facts(entries, groups), warnings=warnings(groups), table=table, beside=beside,
        measures={k: v for k, v in MEASURES.items() if any(g.of(k) for g in groups)}, plots=plots, better=BETTER,
        entries=entries, library=get_plotlyjs(), several=any(len(g.runs) > 1 for g in groups),
        held_out=sorted({(r["config"].get("data.val_rows"), r["config"].get("data.seq_len")) for r in results}),
    )  # fmt: skip


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """With a true minus sign; a dash where there is no value."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def write(root: Path, name: str) -> tuple[Path, str]:
    """Make the page; where it is, and what it says. Raises UserError where no run is done."""
    entries = [read(root, line) for line in manifest(root, name)]
    groups = grouped(entries)
    if not groups:
        listing = "\n".join(f"  {e.state:<10} {shlex.join(e.overrides)}  {e.says}".rstrip() for e in entries)
        raise UserError(f"No run of the sweep {name} is done yet. Type: python train.py sweeps={name}\n{listing}")
    runs = {entry.folder: entry.state for entry in entries}
    left = sum(state != "done" for state in runs.values())
    says = finding(groups) + (f" [{left} of {len(runs)} runs not done and not counted]" if left else "")
    path = root / "sweeps" / f"{name}.html"
    with files.atomic(path) as temporary:
        temporary.write_text(page(root, name, entries, groups, says), encoding="utf-8")
    return path, says


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.report", description="A sweep as one page of HTML.")
    parser.add_argument("name", help="of the sweep, as in python train.py sweeps=NAME")
    parser.add_argument(
        "--root", type=Path, default=Path(os.environ.get("KD_ROOT") or "runs"), help="where runs are kept"
    )
    given = parser.parse_args(arguments)
    try:
        path, says = write(given.root, given.name)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{path}: {says}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Learning curves of the runs of a sweep. The runs themselves are read by kd.experiment.results."""

from __future__ import annotations

import math
from statistics import fmean

from kd.errors import UserError
from kd.evaluation.catalog import LOSS
from kd.experiment.results import Entry
from kd.runs.run import EXACCERR
from kd.system.files import read_json, read_metrics


def learning_curve(entries: list[Entry]) -> list[tuple[float, ...]]:
    """Return tokens, FLOPs and mean validation loss at the steps that all of these runs have."""
    axes, curves = ("tokens", "flops", LOSS.key), []
    for entry in entries:
        lines = read_metrics(entry.folder / "metrics.jsonl")
        curves += [{x["step"]: [x[axis] for axis in axes] for x in lines if LOSS.key in x}]
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    return [tuple(map(fmean, zip(*(steps[s] for steps in curves)))) for s in common]


def exposure_curve(entries: list[Entry]) -> list[float]:
    """Return the mean ExAccErr over length, up to the shortest; empty if a file is missing or damaged."""
    curves = []
    for entry in entries:
        try:
            curves.append([float(x) for x in (read_json(entry.folder / EXACCERR) or {})["exaccerr"]])
        except (UserError, KeyError, TypeError, ValueError):
            return []
    return [mean for mean in map(fmean, zip(*curves)) if math.isfinite(mean)]

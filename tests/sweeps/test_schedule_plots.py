"""Plots of schedules, against their formulas."""

import math

import pytest

from sweeps.report.schedule_plots import schedule_plots
from sweeps.report.table import rows_of
from tests.sweeps.fake import EVIL

COSINE = {"lr": "cosine", "lr.peak": 0.002, "lr.end": 0.0, "lr.warmup": 0.0}
CONSTANT = {"lr": "constant", "lr.peak": 0.001, "lr.warmup": 0.0}
RISING = {"alpha": "linear_increasing", "alpha.start": 0.0, "alpha.peak": 1.0}
FALLING = {"alpha": "linear_decreasing", "alpha.peak": 1.0, "alpha.end": 0.2, "alpha.warmup": 0.0}


def table(sweep):
    return rows_of(sweep.groups())


def test_schedules_are_drawn_as_configured(sweep):
    sweep.done("lm", 0, 2.5, **COSINE).done("lm", 0, 2.51, **CONSTANT)
    sweep.done("fkl", 0, 2.4, **COSINE, **RISING).done("fkl", 0, 2.3, **CONSTANT, **FALLING)
    plots = {plot.title: plot for plot in schedule_plots(table(sweep))}
    assert set(plots) == {"alpha=linear_increasing", "alpha=linear_decreasing", "lr=cosine", "lr=constant"}
    want = {
        "alpha=linear_increasing": lambda x: x, "alpha=linear_decreasing": lambda x: 1 - 0.8 * x,
        "lr=cosine": lambda x: 0.001 * (1 + math.cos(math.pi * x)), "lr=constant": lambda x: 0.001,
    }  # fmt: skip
    for title, formula in want.items():
        (line,) = plots[title].figure.data
        assert list(line.y) == pytest.approx([formula(x) for x in line.x]) and 0 < line.x[0] < line.x[-1] < 1
    (line,) = plots["alpha=linear_decreasing"].figure.data
    assert line.name == "share of distillation, mean 0.6"
    assert plots["lr=cosine"].figure.layout.yaxis.range == plots["lr=constant"].figure.layout.yaxis.range


@pytest.mark.parametrize("alpha", [{"alpha": EVIL}, {"alpha": "_warm"}, {"alpha": "wsd", "alpha.peak": "x"}])
def test_unknown_schedule_is_named_and_not_drawn(sweep, alpha):
    sweep.done("fkl", 0, 2.4, **RISING).done("fkl", 0, 2.3, **alpha)
    plots = {plot.title: plot for plot in schedule_plots(table(sweep))}
    (line,) = plots[f"alpha={alpha['alpha']}"].figure.data
    assert not line.y and line.name == "share of distillation: not in this version"


def test_no_schedules_where_none_vary(sweep):
    assert not schedule_plots(table(sweep.losses(lm=[2.5], fkl=[2.4])))
    # One kind of schedule at two peaks: that is no other schedule.
    assert not schedule_plots(table(sweep.done("rkl", 0, 2.4, **{"alpha.peak": 0.5})))

"""Plots over the axes of a sweep, against numbers made by hand."""

import itertools
import json
import math
import statistics

import pytest

from kd.evaluation.catalog import LOSS
from sweeps.report.axes import axes_of
from sweeps.report.axis_plots import heat_map, line_plots
from sweeps.report.groups import SUPERVISED
from sweeps.report.marginals import marginal_means
from sweeps.report.plots import dots, folded
from sweeps.report.schedule_plots import schedule_plots
from sweeps.report.table import ReferenceLine, rows_of
from tests.sweeps.fake import EVIL, Sweep

T2 = 4.30265  # 97.5% quantile of Student's t with 2 degrees of freedom


def table(sweep):
    return rows_of(sweep.groups())


def crossed(sweep, gains, seeds=(0.0, 0.01, 0.02)):
    """Each temperature with each peak, this much below language modelling alone, seed by seed."""
    for seed, shift in enumerate(seeds):
        sweep.done("lm", seed, 2.5 + shift)
        for (tau, peak), gain in gains.items():
            sweep.done("fkl", seed, 2.5 + shift - gain[seed], **{"temperature.tau": tau, "alpha.peak": peak})
    return sweep


GAINS = {
    (1.0, 0.5): (0.10, 0.11, 0.12), (2.0, 0.5): (0.01, -0.02, 0.01), (4.0, 0.5): (-0.2, -0.21, -0.22),
    (1.0, 0.9): (0.20, 0.21, 0.19), (2.0, 0.9): (0.05, 0.05, 0.06),
}  # fmt: skip


def test_heat_map_shows_the_paired_differences_and_marks_those_within_noise(sweep):
    plot = heat_map(table(crossed(sweep, GAINS)))
    heat = plot.figure.data[0]
    want = [[0.11, 0.20], [0.0, 0.16 / 3], [-0.21, None]]  # by temperature down, by peak across
    assert [len(line) for line in heat.z] == [2, 2, 2]
    for line, gains in zip(heat.z, want):
        assert [z if z is None else -z for z in line] == [g if g is None else pytest.approx(g, abs=1e-9) for g in gains]
    assert list(plot.figure.layout.yaxis.ticktext) == ["1", "2", "4"]
    assert list(plot.figure.layout.xaxis.ticktext) == ["0.5", "0.9"]
    assert heat.zmin == -heat.zmax == pytest.approx(-0.21) and heat.colorscale[0][1].startswith("rgba(59, 120, 216")
    texts = {(a.x, a.y): a.text for a in plot.figure.layout.annotations}
    half = T2 * statistics.stdev([0.10, 0.11, 0.12]) / math.sqrt(3)
    assert texts[0, 0].startswith("−0.1100<br>") and f"± {half:.4f}" in texts[0, 0]
    assert texts[0, 1].startswith("≈ ") and texts[1, 2] == "–"
    frames = [((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in plot.figure.layout.shapes]
    assert frames == [pytest.approx((0, 1))] and not any("≈" in t for at, t in texts.items() if at != (0, 1))


def test_floats_that_are_equal_to_six_digits_have_cells_and_rows_of_their_own(sweep):
    near, exact = 0.1 + 1e-9, repr(0.1 + 1e-9)
    for number, (tau, peak) in enumerate(itertools.product((1.0, 2.0, 4.0), (0.1, near))):
        sweep.done("fkl", 0, 2.1 + 0.1 * number, **{"temperature.tau": tau, "alpha.peak": peak})
    plot = heat_map(table(sweep))
    layout = plot.figure.layout
    assert sorted([*layout.xaxis.ticktext, *layout.yaxis.ticktext]) == ["0.1", exact, "1", "2", "4"]
    losses = sorted(z for line in plot.figure.data[0].z for z in line)
    assert losses == pytest.approx([2.1, 2.2, 2.3, 2.4, 2.5, 2.6])
    labels = [group.label for group in sweep.groups()]
    assert labels[:2] == ["tau=1 alpha.peak=0.1", f"tau=1 alpha.peak={exact}"] and len({*labels}) == 6
    (lines,) = line_plots(table(sweep))
    assert [line.name for line in lines.figure.data] == ["alpha.peak=0.1", f"alpha.peak={exact}"]
    peaks = next(axis for axis in marginal_means(sweep.groups(), LOSS) if axis.key == "alpha.peak")
    assert [mean.text for mean in peaks.means] == ["0.1", exact]


def test_numbers_of_steps_that_are_equal_as_tokens_to_three_digits_have_rows_of_their_own(sweep):
    for steps in (30_000, 30_001):
        sweep.done("fkl", 0, 2.0, **{"trainer.steps": steps})
    assert {group.label for group in sweep.groups()} == {"tokens=122880000", "tokens=122884096"}


def test_heat_map_without_a_baseline_is_of_the_loss(sweep):
    for tau, peak, loss in ((1.0, 0.5, 2.1), (1.0, 0.9, 2.2), (2.0, 0.5, 2.3), (2.0, 0.9, 2.4)):
        sweep.done("fkl", 0, loss, **{"temperature.tau": tau, "alpha.peak": peak})
    plot = heat_map(table(sweep))
    assert sorted(map(list, plot.figure.data[0].z)) == [[2.1, 2.2], [2.3, 2.4]] and plot.title.startswith("loss")
    assert not plot.figure.layout.shapes


def test_losses_of_different_students_are_not_compared(sweep):
    for size, shift in (("100k", 0.0), ("1m", 0.5)):
        for rate, more in ((0.002, 0.2), (0.004, 0.1), (0.008, 0.0)):
            for seed in range(3):
                wide = 0.3 if (size, rate) == ("1m", 0.004) else 0.01 * (1 + more)
                sweep.done(
                    "lm", seed, 3.0 - shift + more + wide * (seed - 1), **{"student.size": size, "lr.peak": rate}
                )
    plot = heat_map(table(sweep))
    z = sorted(z for line in plot.figure.data[0].z for z in line)
    assert z[:2] == [0, 0] and z[2] < 0.2  # above the lowest of the same student
    framed = [a for a in plot.figure.layout.annotations if "≈" in a.text]
    assert len(framed) == 1
    assert plot.figure.layout.xaxis.title.text == "student" or plot.figure.layout.yaxis.title.text == "student"


def test_labels_of_axes_have_room(sweep):
    assert folded("linear_decreasing", 12) == "linear_<br>decreasing"
    assert folded("random target=renormalise", 15) == "random target=<br>renormalise"
    assert folded("alpha top_k k=3", 10) == "alpha<br>top_k k=3"  # what fits a line is not broken
    for temperature in ("linear_increasing", "fixed"):
        for alpha in ("wsd", "constant"):
            for peak in (0.5, 0.9):
                sweep.done("fkl", 0, 2.0 + peak, **{"alpha": alpha, "temperature": temperature, "alpha.peak": peak})
    near = dots(table(sweep), "val/lm", [ReferenceLine("language modelling alone", "dash", {"val/lm": 2.9})])
    (level,) = [a for a in near.layout.annotations if "alone" in a.text]
    assert level.xanchor == "right"  # in a narrow window there is more room over the labels on the left
    far = dots(table(sweep), "val/lm", [ReferenceLine("teacher 1m", "solid", {"val/lm": 1.0})])
    assert [a.xanchor for a in far.layout.annotations if "teacher" in a.text] == ["left"]


def test_heat_map_needs_two_axes_that_are_crossed(sweep, tmp_path):
    sweep.done("fkl", 0, 2.1, truncation="full")
    for k in (1, 10, 100):
        sweep.done("fkl", 0, 2.2, **{"truncation": "top_p_k", "truncation.k": k})
    assert heat_map(table(sweep)) is None  # k belongs to one of the two truncations
    cross = Sweep(tmp_path / "cross")
    for tau, peak in ((1.0, 0.5), (1.0, 0.9), (2.0, 0.5)):
        cross.done("fkl", 0, 2.2, **{"temperature.tau": tau, "alpha.peak": peak})
    assert heat_map(table(cross)) is None
    assert heat_map(table(Sweep(tmp_path / "one").losses(fkl=[2.1], rkl=[2.2], jsd=[2.3]))) is None


def test_settings_that_vary_together_are_one_axis(sweep):
    for size, rate, tau in (("100k", 0.1, 1.0), ("1m", 0.2, 1.0), ("1m", 0.2, 2.0)):
        sweep.done("fkl", 0, 2.2, **{"student.size": size, "lr.peak": rate, "temperature.tau": tau})
    assert sorted(axes_of(sweep.groups())) == ["student.size", "temperature.tau"]


@pytest.mark.parametrize(("values", "kind"), [((0.05, 0.5, 10.0), "log"), ((1.0, 2.0, 8.0), "linear")])
def test_line_over_a_numeric_axis_has_means_intervals_and_the_baseline(sweep, values, kind):
    losses = {tau: [2.3 + shift, 2.31 - shift, 2.32] for tau, shift in zip(values, (0.02, 0.0, 0.05))}
    sweep.losses(lm=[2.5, 2.4, 2.6])
    for tau, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            sweep.done("fkl", seed, loss, **{"temperature.tau": tau})
    (plot,) = line_plots(table(sweep))
    line, level = plot.figure.data
    assert list(line.x) == list(values) and list(line.y) == pytest.approx([sum(v) / 3 for v in losses.values()])
    halves = [T2 * statistics.stdev(v) / math.sqrt(3) for v in losses.values()]
    assert list(line.error_y.array) == pytest.approx(halves, rel=1e-3)
    assert plot.figure.layout.xaxis.type == kind and plot.figure.layout.xaxis.title.text == "temperature τ"
    assert level.name == SUPERVISED and list(level.y) == pytest.approx([2.5, 2.5])
    low, high = plot.figure.layout.xaxis.range
    assert low < (math.log10(values[0]) if kind == "log" else values[0]) < high


def test_line_over_size_has_a_baseline_of_each_size(sweep):
    for size, loss in (("100k", 2.6), ("200k", 2.5), ("1m", 2.3)):
        sweep.done("lm", 0, loss, **{"student.size": size}).done("fkl", 0, loss - 0.1, **{"student.size": size})
    for line, number in zip(sweep.runs, (100_000, 100_000, 200_000, 200_000, 1_000_000, 1_000_000)):
        path = sweep.root / line["run"] / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"non_embedding": number}))
    (plot,) = line_plots(table(sweep))
    line, base = plot.figure.data
    assert list(line.x) == list(base.x) == [1e5, 2e5, 1e6] and list(base.y) == [2.6, 2.5, 2.3]
    assert plot.figure.layout.xaxis.type == "log" and list(plot.figure.layout.xaxis.ticktext) == ["100k", "200k", "1m"]


def test_no_point_is_lost_where_other_steps_have_the_same_tokens(sweep):
    sizes = ((100, 16), (200, 8), (400, 4))
    for steps, batch in sizes:
        for rate in (0.1, 0.2, 0.3):
            settings = {"trainer.steps": steps, "trainer.batch": batch, "lr.peak": rate}
            sweep.done("fkl", 0, 2.0 + steps / 1000 + rate, **settings)
    rows = table(sweep)
    plots = {plot.title: plot.figure for plot in line_plots(rows)}
    assert [list(line.x) for line in plots["trainer.steps"].data] == [[100, 200, 400]] * 3
    assert plots["trainer.steps"].layout.xaxis.title.text == "steps"
    assert [list(line.x) for line in plots["lr.peak"].data] == [[0.1, 0.2, 0.3]] * 3
    assert len({line.name for line in plots["lr.peak"].data}) == 3
    heat = heat_map(rows).figure.data[0]  # losses above the lowest of the same steps
    assert sorted(z for line in heat.z for z in line) == pytest.approx([0.0] * 3 + [0.1] * 3 + [0.2] * 3)


def test_no_line_is_lost_where_another_has_its_name(sweep):
    for value, shift in ((True, 0.0), ("true", 0.1)):
        for rate in (0.1, 0.2, 0.3):
            sweep.done("fkl", 0, 2.0 + shift + rate, **{"data.extra": value, "lr.peak": rate})
    (plot,) = line_plots(table(sweep))
    assert [list(line.y) for line in plot.figure.data] == [[2.1, 2.2, 2.3], pytest.approx([2.2, 2.3, 2.4])]
    assert {line.name for line in plot.figure.data} == {"data.extra=true"}


def test_without_distillation_the_axes_are_those_of_language_modelling(sweep):
    for rate, loss in ((0.001, 2.5), (0.002, 2.4), (0.004, 2.45)):
        sweep.done("lm", 0, loss, **{"lr.peak": rate})
    (plot,) = line_plots(table(sweep))
    assert list(plot.figure.data[0].y) == [2.5, 2.4, 2.45] and len(plot.figure.data) == 1


def test_line_over_k_has_what_is_not_truncated_beside_it(sweep):
    sweep.done("fkl", 0, 2.1, truncation="full")
    for k in (1, 10, 100):
        sweep.done("fkl", 0, 2.2 - k / 1e4, **{"truncation": "top_p_k", "truncation.k": k})
    (plot,) = line_plots(table(sweep))
    assert [trace.name for trace in plot.figure.data] == ["top_p_k", "full"]
    assert list(plot.figure.data[0].x) == [1, 10, 100] and list(plot.figure.data[1].y) == [2.1, 2.1]


@pytest.mark.parametrize("kind", ["two", "one"])
def test_names_in_plots_of_few_axes_are_no_markup(sweep, kind):
    for alpha in (EVIL, "b") if kind == "two" else ("b",):
        for tau in (1.0, 2.0, 4.0):
            sweep.done("fkl", 0, 2.3, **{"alpha": alpha, "temperature.tau": tau})
    if kind == "one":
        sweep.done("fkl", 0, 2.3, temperature=EVIL, **{"temperature.tau": None, "alpha": "b"})
    for plot in filter(None, [heat_map(table(sweep)), *line_plots(table(sweep)), *schedule_plots(table(sweep))]):
        text = plot.figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        assert "<img" not in text and (kind == "one" or "&lt;img" in text or plot.title.startswith("alpha="))

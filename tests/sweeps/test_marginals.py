"""Reports of many settings: marginal means against numbers made by hand, and a page that stays short."""

import csv
import json
import math
import statistics

import pytest
from plotly.offline import get_plotlyjs

from kd.evaluation.catalog import LOSS
from sweeps.report.marginals import marginal_means
from sweeps.report.report import build_report
from sweeps.report.savings import offline_saving, teacher_flops
from sweeps.report.table import BEST, MOST_ROWS, WORST
from sweeps.report.write import write_report
from tests.sweeps.fake import EVIL
from tests.sweeps.test_files import outside

T3 = 4.30265  # 97.5% quantile of Student's t with 2 degrees of freedom
TAUS, PEAKS = (1.0, 2.0), (0.5, 0.9)


def crossed(sweep, losses, without=()):
    """Runs with losses[tau, peak][seed], without some (tau, peak, seed)."""
    for (tau, peak), by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            if (tau, peak, seed) not in without:
                sweep.done("fkl", seed, loss, **{"temperature.tau": tau, "alpha.peak": peak})
    return sweep


LOSSES = {
    (1.0, 0.5): (2.10, 2.21, 2.30), (1.0, 0.9): (2.00, 2.12, 2.23),
    (2.0, 0.5): (2.20, 2.28, 2.41), (2.0, 0.9): (2.31, 2.40, 2.50),
}  # fmt: skip


def means_of(sweep, key="temperature.tau"):
    (axis,) = [axis for axis in marginal_means(sweep.groups(), LOSS) if axis.key == key]
    return axis, {mean.text: mean for mean in axis.means}


def test_marginal_means_and_intervals_over_seeds_are_those_made_by_hand(sweep):
    axis, means = means_of(crossed(sweep, LOSSES))
    one = [2.05, 2.165, 2.265]  # of each seed, over both peaks
    two = [2.255, 2.34, 2.455]
    assert means["1"].mean.mean == pytest.approx(sum(one) / 3) and means["1"].difference is None
    assert means["1"].mean.half == pytest.approx(T3 * statistics.stdev(one) / math.sqrt(3), rel=1e-4)
    gaps = [b - a for a, b in zip(one, two)]
    assert means["2"].difference.mean == pytest.approx(sum(gaps) / 3)
    assert means["2"].difference.half == pytest.approx(T3 * statistics.stdev(gaps) / math.sqrt(3), rel=1e-4)
    assert (means["2"].least, means["2"].most) == (pytest.approx(0.28 / 3), pytest.approx(0.86 / 3))
    assert (means["1"].times_best, means["2"].times_best, axis.used, axis.seeds) == (2, 0, 2, [0, 1, 2])
    assert axis.averaged == "Over 2 combinations of alpha.peak, seeds 0, 1 and 2."


def test_only_combinations_with_all_values_and_seeds_count(sweep):
    missing = {(2.0, 0.9, seed) for seed in range(3)}
    axis, means = means_of(crossed(sweep, LOSSES, missing))
    assert (axis.used, axis.combinations) == (1, 2) and "1 of 2 combinations" in axis.averaged
    assert means["1"].mean.mean == pytest.approx((2.10 + 2.21 + 2.30) / 3)  # not over the peak that 2 lacks
    assert (means["1"].runs, means["2"].runs) == (6, 3)


def test_a_seed_that_few_settings_have_is_left_out(sweep):
    axis, _ = means_of(crossed(sweep, LOSSES, {(2.0, peak, 2) for peak in PEAKS}))
    assert axis.seeds == [0, 1] and axis.used == 2


def test_values_without_common_settings_are_not_compared(sweep):
    sweep.done("fkl", 0, 2.1, truncation="full")
    for k in (1, 10):
        sweep.done("fkl", 0, 2.2, **{"truncation": "top_p_k", "truncation.k": k})
    axis, means = means_of(sweep, "truncation")
    assert axis.averaged.startswith("Not compared: no two of its values") and all(
        m.mean is None for m in means.values()
    )


def test_values_that_share_combinations_are_compared_beside_one_with_more_runs(sweep):
    peaks = {1.0: (0.1, 0.2, 0.3, 0.4, 0.5), 2.0: (0.5, 0.6, 0.7, 0.8), 4.0: (0.5, 0.6, 0.7, 0.8)}
    axis, means = means_of(crossed(sweep, {(tau, peak): (tau + peak,) for tau in peaks for peak in peaks[tau]}))
    assert (axis.used, axis.combinations) == (4, 8)  # not 0.5 alone, which all three values have
    assert means["1"].mean is None and means["1"].runs == 5
    assert means["2"].mean.mean == pytest.approx(2.65) and means["4"].difference.mean == pytest.approx(2.0)


def test_values_are_compared_though_the_one_with_most_runs_has_no_combination_with_them(sweep):
    peaks = {1.0: (0.1, 0.2, 0.3, 0.4), 2.0: (0.6, 0.7), 4.0: (0.6, 0.7, 0.8)}
    axis, means = means_of(crossed(sweep, {(tau, peak): (tau + peak,) for tau in peaks for peak in peaks[tau]}))
    assert axis.used == 2 and [text for text in means if means[text].mean] == ["2", "4"]


def steps_by(sweep, sizes, rates=(0.1, 0.2)):
    """Groups with these (steps, batch), and results with their tokens."""
    for steps, batch in sizes:
        for rate in rates:
            settings = {"trainer.steps": steps, "trainer.batch": batch, "lr.peak": rate}
            sweep.done("fkl", 0, 2.0 + steps / 1000 + batch / 100 + rate, **settings)
    groups = sweep.groups()
    for group in groups:
        tokens = group.config["trainer.steps"] * group.config["trainer.batch"] * group.config["data.seq_len"]
        group.results[0]["tokens"] = tokens
    return groups


@pytest.mark.parametrize(
    ("sizes", "title", "texts"),
    [
        (((100, 8), (100, 16), (200, 8), (200, 16)), "trainer.steps: steps", ["100", "200"]),  # crossed
        (((100, 16), (200, 8)), "trainer.steps: steps", ["100", "200"]),  # the same tokens
        (((100, 16), (200, 16)), "trainer.steps: tokens trained on", ["410k", "819k"]),
    ],
)
def test_steps_are_shown_as_tokens_only_if_they_tell_values_apart(sweep, sizes, title, texts):
    axes = {axis.key: axis for axis in marginal_means(steps_by(sweep, sizes), LOSS)}
    axis = axes["trainer.steps"]
    assert [mean.text for mean in axis.means] == texts and axis.title == title
    assert axis.means[1].difference.mean == pytest.approx(0.02 if len(sizes) == 2 and sizes[1][1] == 8 else 0.1)


def test_one_seed_has_no_interval(sweep):
    axis, means = means_of(crossed(sweep, {at: by_seed[:1] for at, by_seed in LOSSES.items()}))
    assert means["1"].mean.half is None and means["2"].difference.half is None and axis.averaged.endswith("seed 0.")


def many(sweep, count=40):
    sweep.done("lm", 0, 2.9)
    for i in range(count):
        name = EVIL if i == count // 2 else f"n{i}"
        for tau in TAUS:
            sweep.done("fkl", 0, 2.0 + i / 100 + tau / 10, **{"temperature.tau": tau, "alpha": name})
    return sweep


def test_a_long_report_shows_best_and_worst_and_hides_the_rest_behind_a_search(sweep):
    sweep = many(sweep, 20)
    sweep.add(["loss=rkl"], {"state.json": json.dumps({"state": "failed", "reason": EVIL})})
    report, page = sweep.report(), sweep.page()
    assert len(report.rows) == 41 > MOST_ROWS and len(report.shown) <= BEST + WORST + 1
    assert report.shown[:BEST] == report.rows[:BEST] and report.shown[-WORST:] == report.rows[-WORST:]
    assert '<input type="search"' in page and "hidden><small>" in page and 'id="all-rows">' in page
    assert "<img" not in page and "innerHTML" not in page and page.count("<script") == page.count("</script>")
    assert page.index('class="state failed"') < page.index('class="state done"')
    text = sweep.file("md")
    assert "<details>" not in text and "<img" not in outside(text) and "Marginal means" in text
    lines = list(csv.DictReader(sweep.file("axes.csv").splitlines()))
    assert [line["value"] for line in lines if line["axis"] == "temperature.tau"] == ["1", "2"]
    assert float(lines[-1]["mean"]) == pytest.approx(report.axes[-1].means[-1].mean.mean)


def test_a_short_report_has_none_of_that(sweep):
    sweep = many(sweep, 14)
    page = sweep.page()
    assert not sweep.report().axes and 'type="search"' not in page and "Marginal" not in sweep.file("md")
    assert not (sweep.root / "sweeps" / "s.axes.csv").exists()


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_short_report_removes_the_marginal_means_of_an_earlier_long_one(sweep, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    root = f"{prefix}{sweep.root}"
    for count, exists in ((20, True), (14, False)):
        sweep.runs = []
        many(sweep, count).report()
        write_report(root, build_report(root, "s"))
        assert (sweep.root / "sweeps" / "s.axes.csv").exists() == exists
    assert not list(tmp_path.rglob("s.axes.csv"))  # nor in the copy of a URL


def test_a_page_of_hundreds_of_settings_stays_small(sweep):
    sweep = many(sweep, 150)
    page = sweep.page()
    assert page.count('class="plotly-graph-div"') < 10 + BEST + WORST  # a schedule of each row at most
    assert len(page.replace(get_plotlyjs(), "")) < 1_500_000 and len(sweep.file("md")) < 60_000


RECORDED = {"flops": 1300758528.0, "tokens": 1536, "flops_per_token": 211712.0, "teacher_flops_per_token": 211712.0,
            "train_rows": 6}  # fmt: skip
SIZES = {"trainer.steps": 12, "trainer.batch": 4, "data.seq_len": 32}  # of the run with these FLOPs


@pytest.mark.parametrize(
    ("change", "settings"),
    [({}, {}), ({"tokens": 1500}, {}), ({"flops": None}, {}), ({}, {"rollout": "student"}), ({}, {"lm": "plain"})],
)
def test_teacher_cost_is_told_only_where_it_is_on_record(sweep, change, settings):
    sweep.done("fkl", 0, 2.0, **SIZES, **settings).done("fkl", 1, 2.0, **SIZES, **settings)
    groups = sweep.groups()
    for result in (result for group in groups for result in group.results):
        result.update(RECORDED | change)
    if change or settings:
        assert offline_saving(groups) is None
    else:
        assert teacher_flops(groups[0].results[0]) == 1536 * 211712
        saving = offline_saving(groups)
        assert (saving.runs, saving.teacher, saving.stores) == (2, 2 * 1536 * 211712, 6 * 32 * 211712)

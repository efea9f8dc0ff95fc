"""Intervals, paired differences and the share of the gap closed, against numbers made by hand."""

import json
import math
import statistics

import pytest

from sweeps.report.groups import SUPERVISED
from sweeps.report.statistics import difference, gap_closed, indistinguishable, interval
from tests.sweeps.fake import TEACHER, cells


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (5, 2.7764), (31, 2.0423), (100, 1.9842)])
def test_interval_has_students_quantile(n, t):
    values = [0.1 * i * (-1) ** i for i in range(n)]
    got = interval(values)
    assert got.mean == pytest.approx(statistics.mean(values))
    assert got.half == pytest.approx(t * statistics.stdev(values) / math.sqrt(n), rel=2e-5)
    assert interval([1.0]) == (1.0, None, 1) and interval([]) is None


def test_difference_is_paired_over_the_seeds_that_both_have(sweep):
    sweep.losses(lm=[2.5, 3.5], fkl=[2.4, 3.3, 9.0])
    groups = {g.label: g for g in sweep.groups()}
    change = difference(groups["fkl"], groups[SUPERVISED])
    # The seeds differ by 1, their differences by 0.1: pairing is what makes the interval narrow.
    assert change.n == 2 and change.mean == pytest.approx(-0.15) and change.half < 1
    assert gap_closed(groups["fkl"], groups[SUPERVISED]).mean == pytest.approx(0.15 / (3 - TEACHER))
    page = sweep.page()
    assert "Rows differ in their seeds" in page and [cells(page, name)[-2] for name in ("", "fkl")] == ["seeds", "3"]


def test_the_gap_is_closed_over_the_seeds_of_all_and_has_an_interval(sweep):
    for seed, loss in ((1, 3.0), (2, 3.2)):
        sweep.done("lm", seed, loss)
    for seed, loss, teacher in ((1, 2.8, 2.5), (2, 2.9, 2.5), (3, 2.7, 2.2)):
        sweep.done("fkl", seed, loss)
        path = sweep.root / sweep.runs[-1]["run"] / "result.json"
        result = json.loads(path.read_text())
        result["final"]["val/teacher_lm"] = teacher
        path.write_text(json.dumps(result))
    groups = {g.label: g for g in sweep.groups()}
    share = gap_closed(groups["fkl"], groups[SUPERVISED])
    # (0.2 + 0.3) / (0.5 + 0.7); what is left of the changes, 0.2 - 0.5 share and 0.3 - 0.7 share, over the mean gap 0.6
    left = [(0.2 - 0.5 * 5 / 12) / 0.6, (0.3 - 0.7 * 5 / 12) / 0.6]
    assert share.mean == pytest.approx(5 / 12) and share.n == 2
    assert share.half == pytest.approx(12.7062 * statistics.stdev(left) / math.sqrt(2))
    assert gap_closed(groups[SUPERVISED], groups[SUPERVISED]) is None


def test_indistinguishable_groups_are_within_noise_of_the_best(sweep):
    sweep.losses(fkl=[2.30, 2.29, 2.31], akl=[2.31, 2.30, 2.29], tvd=[2.4, 2.39, 2.41])
    sweep.done("rkl", 0, 2.3)  # one seed gives no interval
    groups = {g.label: g for g in sweep.groups()}
    assert [g.label for g in indistinguishable(groups["fkl"], groups.values())] == ["akl"]

"""Verdicts on sweeps, against numbers made by hand."""

import pytest

from kd.evaluation.catalog import LOSS, ROUGE_L
from sweeps.report.groups import SUPERVISED
from sweeps.report.verdict import headline, shortened, verdicts_of
from tests.sweeps.fake import TEACHER, Sweep


def test_one_seed_gives_no_interval(sweep):
    verdict = sweep.losses(lm=[2.455], fkl=[2.33], akl=[2.31]).verdict()
    assert (verdict.best, verdict.rivals, verdict.metric, verdict.baseline) == ("akl", 2, LOSS, SUPERVISED)
    assert verdict.value.mean == pytest.approx(2.31) and verdict.difference.mean == pytest.approx(-0.145)
    assert verdict.difference.half is None and verdict.tied == []
    assert verdict.gap_closed.mean == pytest.approx(0.145 / (2.455 - TEACHER))
    assert verdict.line() == (
        "akl is lowest of 2: 2.310 nats per token on held-out text, −0.145 against language modelling alone, 26% of "
        "the gap to the teacher closed (1 seed: no interval)"
    )


def test_several_seeds_give_an_interval_and_ties(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.31, 2.29, 2.26], akl=[2.31, 2.28, 2.25], tvd=[2.4, 2.38, 2.35])
    verdict = sweep.verdict()
    assert (verdict.best, verdict.rivals, verdict.tied) == ("akl", 3, ["fkl"])
    assert verdict.difference.mean == pytest.approx(-0.19) and verdict.difference.n == 3
    assert 0 < verdict.difference.half < 0.1 and verdict.gap_closed.mean == pytest.approx(1 / 3, abs=0.01)
    line = verdict.line()
    assert "(3 seeds, paired, 95% interval)" in line and line.endswith("; cannot be told apart from it: fkl")


def test_group_of_fewer_seeds_that_is_ahead_on_these_is_named(sweep):
    sweep.losses(lm=[2.50, 2.47, 2.44], fkl=[2.30, 2.29, 2.26], akl=[2.31])
    verdict = sweep.verdict()  # akl has the larger gain, 0.19, on seed 0
    assert verdict.best == "fkl" and verdict.ahead_on_one_seed == []
    verdict = sweep.done("rkl", 0, 2.29).verdict()  # which is ahead of fkl on seed 0
    assert verdict.best == "fkl" and verdict.ahead_on_one_seed == ["rkl"]
    assert verdict.line().endswith("; ahead of it on 1 seed, which may be chance: rkl")


def test_group_of_fewer_seeds_leads_if_it_is_ahead_beyond_noise(sweep):
    assert sweep.losses(fkl=[2.30, 2.29, 2.31, 2.28], akl=[2.20, 2.19, 2.21]).verdict().best == "akl"


def test_single_seed_never_leads_several(sweep):
    verdict = sweep.losses(lm=[2.5] * 3, fkl=[2.30, 2.29, 2.31], akl=[2.2999]).verdict()
    assert verdict.best == "fkl" and verdict.value.mean == pytest.approx(2.3)


def test_difference_within_noise_claims_no_gap_closed(sweep):
    verdict = sweep.losses(lm=[2.50, 2.40, 2.45], fkl=[2.40, 2.48, 2.42]).verdict()
    assert verdict.difference.within_noise and verdict.improves
    assert "within noise" in verdict.line() and "closed" not in verdict.line()


def test_sure_gain_behind_an_unsure_one_is_named(sweep):
    verdict = sweep.losses(lm=[2.5, 2.5, 2.5], fkl=[1.95, 2.6, 2.6], rkl=[2.45, 2.44, 2.46]).verdict()
    assert verdict.best == "fkl" and verdict.difference.within_noise and verdict.surely_better == ["rkl"]
    assert "; better beyond noise: rkl" in verdict.line()


@pytest.mark.parametrize("lm", [[2.3], [2.3, 2.31, 2.29]])
def test_no_improvement(sweep, lm):
    verdict = sweep.losses(lm=lm, fkl=[x + 0.1 for x in lm], rkl=[x + 0.2 for x in lm]).verdict()
    assert verdict.best == "fkl" and not verdict.improves and verdict.difference.mean == pytest.approx(0.1)
    assert "which is no improvement" in verdict.line() and "closed" not in verdict.line()


def test_no_baseline(sweep, tmp_path):
    verdict = sweep.losses(fkl=[2.3, 2.4], rkl=[2.5, 2.6]).verdict()
    assert verdict.best == "fkl" and verdict.difference is verdict.gap_closed is None
    assert verdict.value.mean == pytest.approx(2.35) and verdict.value.half == pytest.approx(0.6353, abs=1e-4)
    assert verdict.baseline is None and verdict.line() == (
        "fkl is lowest of 2: 2.350 ± 0.635 nats per token on held-out text (2 seeds, 95% interval); not compared with "
        "training without a teacher, since no finished run of language modelling alone has the same student, data and "
        "tokens and one of the seeds 0 and 1 (to get it, type the command of the sweep again with logits=none,online)"
    )
    only = Sweep(tmp_path / "only").losses(lm=[2.3]).verdict()
    assert (only.best, only.rivals, only.baseline) == (SUPERVISED, 1, None) and "compare" not in only.line()


def test_baseline_of_another_seed_is_none(sweep):
    sweep.done("lm", 7, 2.5).done("fkl", 3, 2.4, logits="offline")
    assert "no finished run of language modelling alone" in sweep.verdict().line()
    assert sweep.verdict().line().endswith("and seed 3 (to get it, type the command of the sweep again with "
                                           "logits=none,offline)")  # fmt: skip


def test_baseline_beside_lines_of_several_sources_is_added_to_the_sweep(sweep):
    """logits=none,offline,online would be an override of every line, and a cross product."""
    sweep.done("fkl", 0, 2.4, logits="offline").done("fkl", 0, 2.6)
    assert sweep.verdict().line().endswith("and seed 0 (to get it, add runs with logits=none to the sweep)")


def test_baseline_beside_settings_of_the_source_is_added_to_the_sweep(sweep):
    """logits=none has no window and is refused beside logits.window=early."""
    sweep.done("fkl", 0, 2.4, logits="recorded")
    sweep.runs[-1]["overrides"] += ["logits=recorded", "logits.window=early"]
    assert sweep.verdict().line().endswith("and seed 0 (to get it, add runs with logits=none to the sweep)")


@pytest.mark.parametrize(
    ("words", "planned"),
    [
        ("seed=0 logits=none", True), ("seed=0 method=sft", True), ("seed=1 logits=none", False),
        ("seed=0 student=1m logits=none", False), ("seed=0 loss=rkl", False), ("seed=0 method=seqkd", False),
    ],
)  # fmt: skip
def test_baseline_that_is_not_done_comes_with_the_sweep(sweep, words, planned):
    sweep.done("fkl", 0, 2.4).add(words.split())
    assert ("run the sweep again, since its run is not done)" in sweep.report().verdict) == planned
    assert ("logits=none,online)" in sweep.report().verdict) != planned


@pytest.mark.parametrize("logits", ["online", "none"])
def test_baseline_of_responses_is_fine_tuning(sweep, logits):
    verdict = sweep.wrote("fkl", 0, 0.3, logits=logits, rollout="teacher").verdict()
    assert "no finished run of SFT has the same student, data and steps and seed 0" in verdict.line()
    assert verdict.line().endswith("(to get it, add runs with logits=none rollout=none to the sweep)")


def test_each_student_has_a_verdict_of_its_own(sweep):
    for size, shift in (("100k", 0.0), ("200k", 0.2), ("1m", 0.1)):
        for seed in range(3):
            loss = 2.5 - shift + 0.01 * seed
            sweep.done("lm", seed, loss, **{"student.size": size})
            sweep.done("fkl", seed, loss - 0.1, **{"student.size": size, "alpha.peak": 0.5})
            sweep.done("nll", seed, loss - 0.1 + shift * (1 + 0.1 * seed), **{"student.size": size})
            sweep.runs[-2]["name"], sweep.runs[-1]["name"] = "best of all", "plain distillation"
    verdicts = verdicts_of(sweep.groups())
    assert [v.task for v in verdicts] == ["student=200k", "student=1m", "student=100k"]
    assert all(v.best.startswith("best of all") and v.difference.mean == pytest.approx(-0.1) for v in verdicts)
    assert [v.tied for v in verdicts] == [[], [], ["plain distillation student=100k"]]
    assert verdicts[2].short() == "student=100k: best of all 2.410 (−0.100 ± 0.000), like plain distillation"
    line = headline(verdicts, sweep.groups())
    assert line.startswith("in 3 of 3 settings of student, data and tokens the lowest loss is better than ")
    assert "beyond noise in 3; student=200k: best of all 2.210" in line


def test_rates_are_compared_at_each_size_without_a_baseline(sweep):
    for size, shift in (("100k", 0.0), ("1m", 0.5)):
        for rate, more in ((0.004, 0.1), (0.008, 0.0)):
            for seed in range(3):
                loss = 3.0 - shift + more + 0.01 * seed * (1 + more)
                sweep.done("lm", seed, loss, **{"student.size": size, "lr.peak": rate, "teacher.size": None})
    report = sweep.report()
    assert not report.columns.gaps and not report.columns.ranked  # no teacher, and the best is the baseline
    assert [(v.task, v.difference) for v in report.verdicts] == [("student=1m", None), ("student=100k", None)]
    assert all("lr.peak=0.008" in v.best for v in report.verdicts)
    assert report.verdict.startswith("lowest loss in 2 settings of student, data and tokens; student=1m: ")


def test_students_are_compared_with_their_like(sweep):
    for size, gain in (("100k", 0.1), ("1m", -0.1)):
        for seed in range(3):
            sweep.done("lm", seed, 2.5 + seed, **{"student.size": size})
            sweep.done("fkl", seed, 2.5 + seed - gain + seed / 1000, **{"student.size": size})
    verdicts = verdicts_of(sweep.groups())
    assert {v.task: v.improves for v in verdicts} == {"student=100k": True, "student=1m": False}
    assert all(v.difference.beyond_noise for v in verdicts)
    assert headline(verdicts, sweep.groups()).startswith("in 1 of 2 settings")


def test_rouge_l_is_better_if_it_is_higher(sweep, tmp_path):
    for seed in range(3):
        sweep.wrote("lm", seed, 0.3 + seed / 1000).wrote("fkl", seed, 0.2)
    verdict = sweep.verdict()
    assert verdict.metric is ROUGE_L and not verdict.improves and verdict.difference.mean == pytest.approx(-0.101)
    other = Sweep(tmp_path / "other").wrote("lm", 0, 0.2, 1.0).wrote("fkl", 0, 0.3, 3.0).wrote("rkl", 0, 0.1, 2.0)
    assert other.verdict().best == "fkl" and other.verdict().baseline == "SFT" and other.verdict().improves
    assert other.verdict().line().startswith("fkl is highest of 2: 0.300 Rouge-L on held-out prompts, +0.100 against")


def test_many_names_are_cut():
    assert shortened(["a", "b", "c"]) == "a, b and c" and shortened(["a", "b", "c", "d"]) == "a, b and 2 more"

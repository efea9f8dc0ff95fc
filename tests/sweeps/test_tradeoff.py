"""Distillation against language modelling at equal compute, against numbers made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from sweeps.fit import laws, tradeoff
from sweeps.fit.observations import Observation
from sweeps.fit.tradeoff import SCENARIOS, ComputeTradeoff, TeacherCost, teachers_of, tradeoffs_of
from sweeps.fit.tradeoff_plots import tradeoff_plot
from sweeps.fit.verdict import verdict
from tests.sweeps.planted import ALONE, AMOUNTS, SIZES, TAUGHT


def test_tokens_that_compute_pays_for_by_hand():
    teacher = TeacherCost("t", 2.0, 1e6, tokens=1e6, flops_per_token=10.0)
    tokens = [tradeoff.student_tokens(np.array([1e8]), 5.0, teacher, s).item() for s in SCENARIOS]
    # 3 F_S = 15; inference adds 10 per token; training the teacher takes 3 * 10 * 1e6 = 3e7 first.
    assert tokens == pytest.approx([1e8 / 15, 1e8 / 25, 7e7 / 15, 7e7 / 25])
    assert np.isnan(tradeoff.student_tokens(np.array([2e7]), 5.0, teacher, SCENARIOS[2])).all()
    unknown = replace(teacher, tokens=None)
    assert np.isnan(tradeoff.student_tokens(np.array([1e8]), 5.0, unknown, SCENARIOS[3])).all()


def test_gain_is_that_of_the_best_teacher():
    among = [TeacherCost(name, loss, 1e6, 1e6, 10.0) for name, loss in (("a", 1.8), ("b", 2.4), ("c", 2.0))]
    compute, student = np.array([1e13, 1e15]), (1e6, 2e6)
    single = [tradeoff.loss_reduction(compute, student, 1.0, [t], SCENARIOS[0], ALONE, TAUGHT) for t in among]
    best = tradeoff.loss_reduction(compute, student, 1.0, among, SCENARIOS[0], ALONE, TAUGHT)
    assert best.tolist() == np.max(single, 0).tolist() and np.ptp(single, 0).min() > 0.01
    tokens = compute[0] / 6e6
    alone = laws.supervised(ALONE, 1e6, tokens)
    assert single[2][0] == pytest.approx(alone - laws.distilled(TAUGHT, 1e6, tokens, 2.0, alone))


def test_distillation_wins_where_the_planted_laws_say(fits):
    among = teachers_of(fits.distilled_runs)
    assert [t.label for t in among] == ["large", "medium", "small", "tiny"]
    tradeoffs = tradeoffs_of(fits)
    assert len(tradeoffs) == len(SIZES) * len(SCENARIOS)
    for tradeoff_of_size in tradeoffs:
        true = tradeoff.loss_reduction(
            tradeoff_of_size.compute,
            (tradeoff_of_size.parameters, 2 * tradeoff_of_size.parameters),
            min(AMOUNTS),
            among,
            tradeoff_of_size.scenario,
            ALONE,
            TAUGHT,
        )
        clear = np.abs(true) > 0.02
        assert (np.isnan(true) == np.isnan(tradeoff_of_size.loss_reduction)).all()
        assert (np.sign(tradeoff_of_size.loss_reduction) == np.sign(true))[clear & np.isfinite(true)].all()
    free, *_, counted = tradeoffs[:4]
    assert (
        np.nanmax(free.loss_reduction - counted.loss_reduction) > 0
        and np.nanmin(free.loss_reduction - counted.loss_reduction) > -1e-9
    )
    assert free.compute[0] == pytest.approx(6 * SIZES[0] * AMOUNTS[0]) and np.isnan(counted.loss_reduction[0])


def test_ranges_by_hand():
    compute, gains = np.array([1e9, 1e10, 1e11, 1e12]), np.array([0.1, 0.1, -0.1, np.nan])
    case = ComputeTradeoff(1e6, SCENARIOS[0], compute, gains, gains - 0.2, gains + 0.2)
    assert case.ranges() == [(1e9, 1e10)] and case.ranges(beyond_noise=True) == []
    assert (case.ranges_text(), case.ranges_text(beyond_noise=True)) == ("1.0e+09–1.0e+10", "nowhere")
    assert replace(case, loss_reduction=-gains).ranges() == [(1e11, 1e11)]
    assert replace(case, loss_reduction=np.array([1, -1, 1, 1])).ranges() == [(1e9, 1e9), (1e11, 1e12)]
    nothing = np.full(4, np.nan)
    assert replace(case, low=nothing, high=nothing).ranges_text(beyond_noise=True) == "unknown"  # no bootstrap
    unpaid = replace(case, loss_reduction=nothing, low=nothing, high=nothing)
    assert unpaid.ranges_text() == unpaid.ranges_text(beyond_noise=True) == "nowhere"
    assert replace(unpaid, has_known_cost=False).ranges_text() == "unknown"


def test_ranges_beyond_what_was_measured_are_marked():
    compute, gains = np.array([1e9, 1e10, 1e11, 1e12]), np.array([0.1, -0.1, 0.1, -0.1])
    case = ComputeTradeoff(1e6, SCENARIOS[0], compute, gains, gains - 0.2, gains, measured_up_to=5e10)
    assert case.ranges_text() == "1.0e+09–1.0e+09, 1.0e+11–1.0e+11 †"
    assert replace(case, measured_up_to=1e11).ranges_text() == "1.0e+09–1.0e+09, 1.0e+11–1.0e+11"
    assert replace(case, loss_reduction=np.array([-1, 1, 1, -1])).ranges_text() == "1.0e+10–1.0e+11 †"


def test_verdict_has_the_ranges_of_a_free_and_of_a_paid_teacher(fits):
    free, *_, both = tradeoffs_of(fits)[: len(SCENARIOS)]
    line = verdict(fits)
    assert f"{free.ranges_text()} FLOPs († beyond the {free.measured_up_to:.1e} measured)" in line
    assert both.ranges_text() in line.partition("measured), at ")[2]


def test_a_student_was_measured_as_far_as_it_was_run_both_ways(fits):
    observation = Observation("t", 1e5, 1e6, 2.0, 5.0, "t", 1.9, 1e6, teacher_tokens=2e6, teacher_flops_per_token=10.0)
    # 3 * 5 * 1e6; the teacher reads as much, and was trained on 2e6 tokens.
    assert [tradeoff.distillation_cost(observation, s) for s in SCENARIOS] == [1.5e7, 2.5e7, 1.5e7 + 6e7, 2.5e7 + 6e7]
    assert tradeoff.distillation_cost(observation._replace(teacher_tokens=None), SCENARIOS[2]) == 0
    short = [p for p in fits.runs if not p.teacher or p.parameters > SIZES[0] or p.tokens < AMOUNTS[-1]]
    free, *_, others = [c for c in tradeoffs_of(replace(fits, runs=short)) if c.scenario == SCENARIOS[0]]
    assert free.measured_up_to == 6 * SIZES[0] * AMOUNTS[-2] and others.measured_up_to == 6 * SIZES[-1] * AMOUNTS[-1]
    figure = tradeoff_plot(replace(fits, runs=short), tradeoffs_of(replace(fits, runs=short)))
    dotted, dashed, solid = figure.data[:3]
    assert dotted.line.dash == "dot" and np.nanmin(dotted.x[~np.isnan(dotted.y)]) > free.measured_up_to
    for line in (dashed, solid):
        assert np.nanmax(line.x[~np.isnan(line.y)]) <= free.measured_up_to


def test_a_teacher_of_unknown_cost_is_no_teacher_that_costs_too_much(fits):
    tradeoffs = tradeoffs_of(replace(fits, runs=[p._replace(teacher_tokens=None) for p in fits.runs]))
    assert [tradeoff_of_size.has_known_cost for tradeoff_of_size in tradeoffs[:4]] == [True, True, False, False]
    assert (
        tradeoffs[3].ranges_text()
        == tradeoffs[3].ranges_text(beyond_noise=True)
        == "unknown"
        != tradeoffs[1].ranges_text()
    )

"""Scaling laws: planted coefficients are found, the published prediction is reproduced, doubts are said."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from kd.errors import UserError
from sweeps import answers, contest, curves, fit, laws, points
from sweeps.compare import Entry, read
from sweeps.laws import DISTILLATION, POWER, PUBLISHED, SUPERVISED, Data, Problem
from sweeps.points import Point
from tests.small import here
from tests.test_report import Sweep

ALONE = {"E": 1.7, "A": 60.0, "B": 400.0, "alpha": 0.35, "beta": 0.45, "gamma": 0.8}
TAUGHT = {"A": 45.0, "B": 250.0, "alpha": 0.3, "beta": 0.5, "gamma": 0.9, "c0": 1.5, "c1": 2.0, "f1": 0.3, "d1": 1.1}
SIZES, AMOUNTS = (1e5, 3e5, 1e6, 3e6), (1e5, 4e5, 1.6e6, 6.4e6, 2.56e7)
# Parameters, tokens: the weakest is worse than what most students reach alone, which is what shows d1.
TEACHERS = {"tiny": (1e5, 1e5), "small": (1e5, 2e6), "medium": (1e6, 8e6), "large": (1e7, 1e8)}


def repeated(alone: list[Point], offset: float, noise: float, seed: int, seeds: int = 3) -> list[Point]:
    """Runs of several seeds: noise of their own, and an offset that all seeds of a setting share."""
    rng = np.random.default_rng(seed)
    shifts = [(p, offset * rng.normal()) for p in alone]
    return [
        p._replace(loss=p.loss * math.exp(shift + noise * rng.normal())) for p, shift in shifts for _ in range(seeds)
    ]


def planted(noise: float, seed: int = 0, taught: bool = True) -> list[Point]:
    """Runs whose losses are those of the two laws, but for noise in their logarithms."""
    rng = np.random.default_rng(seed)
    found = [
        Point(f"lm-{n:g}-{d:g}", n, d, laws.supervised(ALONE, n, d) * math.exp(noise * rng.normal()), 2 * n)
        for n in SIZES
        for d in AMOUNTS
    ]
    for name, (size, tokens) in TEACHERS.items() if taught else ():
        loss = laws.supervised(ALONE, size, tokens)
        for n in SIZES:
            for d in AMOUNTS:
                own = laws.distilled(TAUGHT, n, d, loss, laws.supervised(ALONE, n, d)) * math.exp(noise * rng.normal())
                found.append(Point(f"{name}-{n:g}-{d:g}", n, d, own, 2 * n, name, loss, size, tokens, 2 * size))
    return found


@pytest.fixture(scope="module")
def found() -> answers.Answers:
    return answers.answers("planted", planted(0.002, seed=1), [], draws=40, seed=0)


def test_published_law_gives_the_published_prediction():
    # arXiv 2502.08606: a teacher of 1.82B parameters and a student of 546M, both with 20 tokens per parameter.
    supervised, distillation = PUBLISHED["supervised"], PUBLISHED["distillation"]
    teacher, n = laws.supervised(supervised, 1.82e9, 20 * 1.82e9), 546e6
    alone = laws.supervised(supervised, n, 20 * n)
    assert laws.distilled(distillation, n, 20 * n, teacher, alone) == pytest.approx(2.42, abs=0.005)
    assert alone > 2.5


def test_laws_by_hand():
    c = {"E": 1.0, "A": 8.0, "B": 27.0, "alpha": 0.5, "beta": 1.0, "gamma": 2.0}
    assert laws.supervised(c, 16.0, 9.0) == pytest.approx(1 + (8 / 4 + 27 / 9) ** 2)
    assert laws.power({"E": 1.0, "C": 6.0, "kappa": 0.5}, 9.0) == pytest.approx(3.0)
    # L_T / (L d1) = 2 / (1 * 1) and f1 = 1/2: the factor is (1 + 2^2)^-(2/2) = 1/5, and L_T^-c0 is 1/4.
    c |= {"c0": 2.0, "c1": 2.0, "f1": 0.5, "d1": 1.0}
    assert laws.distilled(c, 16.0, 9.0, 2.0, 1.0) == pytest.approx(2 + 25 / 20)


def test_distillation_in_the_limits():
    d = {**TAUGHT, "c1": 1e-9}
    far, near = (laws.distilled(d, n, n * 20, 2.0, 2.2) for n in (1e5, 1e12))
    assert far > near > 2.0 and near == pytest.approx(2.0, abs=0.01)  # a student without limits copies its teacher
    worse = laws.distilled(TAUGHT, 1e6, 1e6, 50.0, 2.0)
    assert worse == pytest.approx(50.0, rel=1e-3) and math.isfinite(worse)


@pytest.mark.parametrize(
    "written",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),  # as spreadsheets save "CSV UTF-8"
        lambda text: text.encode() + b"\n\n  \n,,,,\n",
        lambda text: text.replace("\n", "\r\n").encode() + b"\r\n",
        lambda text: ("\n" + text.replace("parameters,tokens", " parameters , tokens")).encode(),
    ],
    ids=["mark", "blank-end", "windows", "spaces"],
)
def test_csv_of_a_spreadsheet_is_read(tmp_path, written):
    path = tmp_path / "p.csv"
    path.write_bytes(written("parameters,tokens,loss,seed\n1e6,2e6,2.5,0\n1e6,4e6,2.25,1\n"))
    assert [(p.parameters, p.tokens, p.loss, p.seed) for p in points.from_csv(path)] == [
        (1e6, 2e6, 2.5, "0"), (1e6, 4e6, 2.25, "1"),
    ]  # fmt: skip
    path.write_bytes(written("parameters,tokens,loss,seed\n\n1e6,2e6,x,0\n"))
    number = 4 if path.read_bytes().startswith(b"\n") else 3
    with pytest.raises(UserError, match=f"line {number}: "):
        points.from_csv(path)


def test_csv_with_other_separators_is_refused_with_what_is_needed(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("parameters;tokens;loss\n1e6;2e6;2,5\n")
    with pytest.raises(UserError, match=r"lacks .* separated by ';' here; needed are commas"):
        points.from_csv(path)


@pytest.mark.parametrize("law", [POWER, SUPERVISED, DISTILLATION], ids=lambda law: law.name)
def test_gradient_is_the_finite_difference_and_the_fitted_form_is_the_written_one(law):
    rng = np.random.default_rng(0)
    n, d, teacher = np.exp(rng.normal(12, 2, 9)), np.exp(rng.normal(14, 2, 9)), rng.uniform(1.8, 4, 9)
    alone = laws.supervised(ALONE, n, d)
    problem = Problem(law, Data(n, d, rng.uniform(2, 4, 9), teacher), alone if law is DISTILLATION else None)
    for theta in problem.grid[rng.integers(len(problem.grid), size=20)]:
        theta = theta + rng.normal(0, 0.1, len(theta))
        value, slopes = law.log(theta, problem.inputs)
        steps = 1e-6 * np.eye(len(theta))
        around = [(law.log(theta + s, problem.inputs)[0] - law.log(theta - s, problem.inputs)[0]) / 2e-6 for s in steps]
        np.testing.assert_allclose(slopes, np.stack(around), rtol=1e-5, atol=1e-8)
        c = problem.coefficients(theta)
        written = {POWER.name: lambda c: laws.power(c, n), SUPERVISED.name: lambda c: laws.supervised(c, n, d),
                   DISTILLATION.name: lambda c: laws.distilled(c, n, d, teacher, alone)}[law.name]  # fmt: skip
        np.testing.assert_allclose(np.exp(value), written(c), rtol=1e-9)


def test_huber_by_hand_and_its_slope():
    value, slope = laws.huber(np.array([0.0, 0.5, -3.0]), delta=1.0)
    assert value.tolist() == [0.0, 0.125, 2.5] and slope.tolist() == [0.0, 0.5, -1.0]


def test_planted_coefficients_are_in_their_intervals(found):
    for of, true in ((found.supervised, ALONE), (found.distillation, TAUGHT)):
        for name, value in true.items():
            low, high = of.interval(name)
            assert low <= value <= high, (of.law.name, name, value, of.interval(name))
    # Intervals that hold because they are endless would say nothing.
    for of, most in ((found.supervised, 1.5), (found.distillation, 6.0)):
        for name in of.law.names:
            low, high = of.interval(name)
            assert 0 < low < high < most * low, (of.law.name, name, low, high)
    low, high = found.supervised.interval("E")
    assert high - low < 0.1 and found.supervised.error < 0.005 and found.distillation.error < 0.005
    assert not found.supervised.loose and found.cannot == []


def test_without_noise_the_coefficients_are_those_planted():
    of = answers.fitted(SUPERVISED, "", planted(0.0, taught=False), draws=0, seed=0)
    assert of.coefficients == pytest.approx(ALONE, rel=0.01) and of.error < 1e-4 and of.interval("E") is None


def test_a_fit_says_which_law_it_is_at(capsys):
    some = [p for p in planted(0.0, taught=False) if p.parameters == SIZES[0]]
    answers.fitted(POWER, "over tokens", some, draws=1, seed=0, axis="tokens")
    assert capsys.readouterr().err.startswith("fitting the power law over tokens to 5 runs")


@pytest.mark.slow
def test_intervals_narrow_with_noise_and_one_seed_gives_one_answer():
    def width(noise, seed=0):
        of = answers.fitted(SUPERVISED, "", planted(noise, taught=False), draws=20, seed=seed)
        low, high = of.interval("beta")
        return high - low

    assert width(0.0005) < width(0.005) / 3
    assert width(0.001) == width(0.001) != width(0.001, seed=1)


def test_seeds_of_one_setting_are_drawn_together():
    alone = planted(0.002, taught=False)
    once, thrice = (answers.fitted(POWER, "", some, 40, 0, axis="tokens") for some in (alone, 3 * alone))
    for name in POWER.names:  # the same runs three times tell no more
        assert thrice.interval(name) == pytest.approx(once.interval(name), rel=1e-3)


@pytest.mark.parametrize("seed", [3, 4])
def test_intervals_cover_what_is_planted_where_seeds_share_an_offset(monkeypatch, seed):
    some = repeated(planted(0, taught=False), offset=0.005, noise=0.0005, seed=seed)

    def missed():
        of = answers.fitted(SUPERVISED, "", some, 20, 0)
        return [k for k, true in ALONE.items() if not of.interval(k)[0] <= true <= of.interval(k)[1]]

    assert not missed()
    monkeypatch.setattr(answers, "settings_of", lambda points: np.arange(len(points)))  # as if no run shared anything
    assert missed()


def test_held_out_runs_are_the_largest_and_are_not_seen(found):
    of = found.supervised
    compute = points.column(of.points, "compute")
    assert of.held.sum() >= 0.2 * len(of.points) and compute[of.held].min() > compute[~of.held].max()
    # Whatever stands in the runs that are held out, the fit without them is the same, and its error on them is not.
    wrong = [p._replace(loss=2 * p.loss) if out else p for p, out in zip(of.points, of.held)]
    again = answers.fitted(SUPERVISED, "", wrong, draws=0, seed=0)
    assert again.part == of.part and again.error == pytest.approx(0.5, abs=0.01)
    alone = [p for p, out in zip(of.points, of.held) if not out]
    assert answers.fitted(SUPERVISED, "", alone, draws=0, seed=0).coefficients == of.part


def test_lack_of_fit_by_hand():
    residuals, settings = np.array([0.1, 0.3, -0.1, 0.1, 0.0, 0.2]), np.array([0, 0, 1, 1, 2, 2])
    # Means 0.2, 0 and 0.1: 2 (0.04 + 0.01) / 2 against 6 * 0.01 / 3. P(F(2, 3) > f) = (1 + 2 f / 3)^(-3/2).
    got = laws.lack_of_fit(residuals, settings, np.zeros(6, int), 1)
    assert got.f == pytest.approx(2.5) and got.freedom == (2, 3)
    assert got.p == pytest.approx((1 + 5 / 3) ** -1.5) and got.noise
    assert laws.lack_of_fit(residuals, np.arange(6), np.zeros(6, int), 1) is None  # one seed each
    assert laws.lack_of_fit(residuals, settings, np.zeros(6, int), 3) is None
    # A shift that all runs of a seed share changes nothing, whatever it is: half the differences of the two seeds of a
    # setting are 0.1, 0.1 and 0.07, and what is left are these without their mean, with 2 degrees of freedom.
    seeds, uneven = np.array([0, 1] * 3), residuals + np.array([0, 0, 0, 0, 0, -0.06])
    shifted = laws.lack_of_fit(uneven + np.array([-0.25, 0.25] * 3), settings, seeds, 1)
    halves = np.array([0.1, 0.1, 0.07])
    pure = 2 * ((halves - halves.mean()) ** 2).sum() / 2
    means = np.array([0.2, 0.0, 0.07])
    assert shifted.freedom == (2, 2) and shifted.f == pytest.approx((2 * means**2).sum() / 2 / pure)


def test_a_law_that_misses_settings_is_said_to_and_one_that_holds_is_too():
    exact = planted(0, taught=False)
    holds, misses = (
        answers.fitted(SUPERVISED, "", repeated(exact, offset, 0.002, seed=0), 0, 0) for offset in (0.0, 0.01)
    )
    assert (
        holds.lack.freedom == (20 - 6, 40) and holds.lack.p > 0.1 and holds.holds == "holds within the noise of seeds"
    )
    assert misses.lack.p < 1e-4 and "by more than the noise of seeds (lack of fit: F(14, 40) =" in misses.test
    assert answers.fitted(SUPERVISED, "", exact, 0, 0).holds == ""


def test_a_straight_line_in_logarithms_stands_beside_the_error(found):
    n, d = np.log([1e5, 1e6, 1e5, 1e6, 1e7]), np.log([1e6, 1e6, 1e7, 1e7, 1e8])
    loss, seen = 2 - 0.1 * n - 0.05 * d, np.array([True] * 4 + [False])
    assert laws.straight(np.stack([n, d]), loss, seen) == pytest.approx(loss)
    of = found.supervised
    assert of.error < of.straight < 0.2 and f"straight line in logarithms is off by {of.straight:.2%}" in of.beside
    assert of.beside in fit.finding(found)


def test_runs_of_equal_compute_are_held_out_together():
    compute = np.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0 + 1e-9])
    each, pairs = np.arange(8), np.arange(8) // 2
    assert laws.held_out(compute, each, 2).tolist() == [False] * 6 + [True] * 2
    assert not laws.held_out(compute, each, 7).any()  # too few would be left
    assert laws.held_out(compute, pairs, 3).any() and not laws.held_out(compute, pairs, 4).any()


def test_what_cannot_be_fitted_is_said():
    alone = planted(0.001, taught=False)
    only = answers.answers("x", alone, [], draws=0, seed=0)
    assert only.supervised and only.distillation is None and "no run learns from a teacher" in only.cannot[0]
    one = answers.answers("x", [p for p in alone if p.parameters == 1e6], [], draws=0, seed=0)
    assert (
        one.supervised is None and "5 settings in 5 runs, 1 size and" in one.cannot[0] and set(one.powers) >= {"tokens"}
    )
    taught = [p for p in planted(0.001) if p.teacher in (None, "large")]
    assert "2 teachers" in " ".join(answers.answers("x", taught, [], draws=0, seed=0).cannot)
    nothing = answers.answers("x", alone[:2], [], draws=0, seed=0)
    assert nothing.fits == [] and fit.finding(nothing).startswith("nothing could be fitted")


@pytest.mark.parametrize(("sizes", "amounts"), [(SIZES[:2], AMOUNTS[:2]), (SIZES[:2], AMOUNTS[:3])])
def test_a_law_needs_more_settings_than_coefficients_however_often_each_was_run(sizes, amounts):
    some = [p for p in planted(0.0, taught=False) if p.parameters in sizes and p.tokens in amounts]
    runs = [p._replace(seed=str(seed), loss=p.loss + 0.001 * seed) for p in some for seed in range(4)]
    found = answers.answers("x", runs, [], draws=5, seed=0)
    assert found.supervised is None and found.distillation is None
    said = f"at least 7 settings of at least 2 student sizes .* here: {len(some)} settings in {len(runs)} runs"
    assert re.search(said, found.cannot[0])
    headline = fit.finding(found)
    assert headline.startswith("nothing could be fitted") and "irreducible loss" not in headline
    # So do the settings that a teacher's students have, and those that are left where the largest are held out.
    taught = [p for p in planted(0.0) if p.teacher and p.parameters in sizes and p.tokens in amounts[:2]]
    assert answers.lacks([p._replace(seed=str(seed)) for p in taught[:9] for seed in range(4)], DISTILLATION)


def test_the_headline_says_what_the_doubts_say():
    some = [p for p in planted(0.001, taught=False) if p.parameters in SIZES[:2]]
    found = answers.answers("x", some, [], draws=10, seed=0)
    of, headline = found.supervised, fit.finding(found)
    assert {"E", "A", "alpha"} <= set(of.loose) and not {"B", "beta"} & set(of.thin)
    assert "irreducible loss of language modelling cannot be told from these runs" in headline
    assert "but the supervised law is fitted to 2 student sizes: an exponent needs at least 3" in headline
    assert "but 10 settings are few for the 6 coefficients of the supervised law" in headline
    assert set(of.limits) <= set(of.doubts)
    coefficients = fit.as_json(found)["fits"][0]["coefficients"]
    assert not coefficients["E"]["known"] and not coefficients["alpha"]["known"]


def test_a_coefficient_that_runs_do_not_tell_is_said():
    # Where size costs nothing, the exponent of size cannot be seen.
    blind = {**ALONE, "A": 1e-6}
    rng = np.random.default_rng(0)
    some = [p._replace(loss=laws.supervised(blind, p.parameters, p.tokens) * math.exp(0.001 * rng.normal()))
            for p in planted(0, taught=False)]  # fmt: skip
    of = answers.fitted(SUPERVISED, "", some, draws=20, seed=0)
    assert "irreducible loss of language modelling is" in fit.finding(answers.Answers("x", some, [], supervised=of))
    of.samples[:] = [sample | {"E": 0.01 * 2**i} for i, sample in enumerate(of.samples)]
    assert "cannot be told" in fit.finding(answers.Answers("x", some, [], supervised=of))
    assert of.loose and any("alpha" in line and "cannot be told" in line for line in of.doubts), of.doubts
    assert of.coefficients["E"] == pytest.approx(ALONE["E"], rel=0.02)


def test_ends_of_what_was_searched_are_no_values(found):
    of = replace(found.distillation, coefficients=found.distillation.coefficients | {"gamma": 4.97, "f1": 0.01004})
    assert (of.says("gamma"), of.says("f1")) == ("≥ 4.97", "≤ 0.01004") and of.stuck == ["gamma", "f1"]
    assert {"gamma", "f1"} <= set(of.loose) and any("gamma and f1" in line for line in answers.doubts(of))
    of.samples = [s | {"alpha": 5.0 if i % 2 else 0.8} for i, s in enumerate(of.samples)]
    assert of.spans("alpha") == "0.8 to ≥ 5" and "≥" not in of.spans("beta") and "alpha" in of.loose
    page = curves.page(replace(found, distillation=of), "x")
    assert '<td class="bad">≥ 4.97</td>' in page and '<span class="bad">' in page
    # E is counted in units of the least loss: 0.3 % above its bound is at it.
    least = min(p.loss for p in found.supervised.points)
    at_end = replace(found.supervised, coefficients=found.supervised.coefficients | {"E": 1.003e-3 * least})
    assert at_end.stuck == ["E"] and not found.supervised.stuck


@pytest.mark.parametrize("name", ["A", "alpha"])
def test_what_spans_more_than_an_order_of_magnitude_is_not_known(found, name):
    of = replace(found.supervised, samples=[s | {name: 0.37 * 1.2**i} for i, s in enumerate(found.supervised.samples)])
    assert of.loose == [name]


def test_power_law_over_one_axis(found):
    of = found.powers["tokens"]
    assert {p.parameters for p in of.points} == {max(SIZES)} and len(of.points) == len(AMOUNTS)
    best = found.powers["compute"].points
    assert all(not any(q.compute <= p.compute and q.loss < p.loss for q in found.alone) for p in best)


def test_tokens_that_compute_pays_for_by_hand():
    teacher = contest.Teacher("t", 2.0, 1e6, tokens=1e6, flops_per_token=10.0)
    tokens = [contest.student_tokens(np.array([1e8]), 5.0, teacher, s).item() for s in contest.SCENARIOS]
    # 3 F_S = 15; inference adds 10 per token; training the teacher takes 3 * 10 * 1e6 = 3e7 first.
    assert tokens == pytest.approx([1e8 / 15, 1e8 / 25, 7e7 / 15, 7e7 / 25])
    assert np.isnan(contest.student_tokens(np.array([2e7]), 5.0, teacher, contest.SCENARIOS[2])).all()
    unknown = teacher._replace(tokens=None)
    assert np.isnan(contest.student_tokens(np.array([1e8]), 5.0, unknown, contest.SCENARIOS[3])).all()


def test_gain_is_that_of_the_best_teacher():
    among = [contest.Teacher(name, loss, 1e6, 1e6, 10.0) for name, loss in (("a", 1.8), ("b", 2.4), ("c", 2.0))]
    compute, student = np.array([1e13, 1e15]), (1e6, 2e6)
    single = [contest.gain(compute, student, 1.0, [t], contest.SCENARIOS[0], ALONE, TAUGHT) for t in among]
    best = contest.gain(compute, student, 1.0, among, contest.SCENARIOS[0], ALONE, TAUGHT)
    assert best.tolist() == np.max(single, 0).tolist() and np.ptp(single, 0).min() > 0.01
    tokens = compute[0] / 6e6
    alone = laws.supervised(ALONE, 1e6, tokens)
    assert single[2][0] == pytest.approx(alone - laws.distilled(TAUGHT, 1e6, tokens, 2.0, alone))


def test_distillation_wins_where_the_planted_laws_say(found):
    among = contest.teachers(found.taught)
    assert [t.label for t in among] == ["large", "medium", "small", "tiny"]
    made = contest.contests(found)
    assert len(made) == len(SIZES) * len(contest.SCENARIOS)
    for of in made:
        true = contest.gain(
            of.compute, (of.parameters, 2 * of.parameters), min(AMOUNTS), among, of.scenario, ALONE, TAUGHT
        )
        clear = np.abs(true) > 0.02
        assert (np.isnan(true) == np.isnan(of.gain)).all()
        assert (np.sign(of.gain) == np.sign(true))[clear & np.isfinite(true)].all()
    free, *_, counted = made[:4]
    assert np.nanmax(free.gain - counted.gain) > 0 and np.nanmin(free.gain - counted.gain) > -1e-9
    assert free.compute[0] == pytest.approx(6 * SIZES[0] * AMOUNTS[0]) and np.isnan(counted.gain[0])


def test_ranges_are_said():
    compute, gains = np.array([1e9, 1e10, 1e11, 1e12]), np.array([0.1, 0.1, -0.1, np.nan])
    of = contest.Contest(1e6, contest.SCENARIOS[0], compute, gains, gains - 0.2, gains + 0.2)
    assert of.ranges(False) == [(1e9, 1e10)] and of.says() == "up to 1.0e+10 FLOPs" and of.says(sure=True) == "nowhere"
    assert of._replace(gain=-gains).says() == "from 1.0e+11 to 1.0e+11 FLOPs"
    assert of._replace(gain=np.ones(4)).says() == "everywhere"
    nothing = np.full(4, np.nan)
    assert of._replace(low=nothing, high=nothing).says(sure=True) == "unknown"  # no bootstrap
    unpaid = of._replace(gain=nothing, low=nothing, high=nothing)
    assert unpaid.says() == unpaid.says(sure=True) == "nowhere" and unpaid._replace(known=False).says() == "unknown"


def test_what_is_won_beyond_what_was_measured_is_called_extrapolated():
    compute, gains = np.array([1e9, 1e10, 1e11, 1e12]), np.array([0.1, 0.1, 0.1, -0.1])
    of = contest.Contest(1e6, contest.SCENARIOS[0], compute, gains, gains - 0.2, gains, measured=5e10)
    assert of.says() == "as far as measured (5.0e+10 FLOPs), extrapolated up to 1.0e+11"
    assert of.says(sure=True) == "nowhere"
    assert of._replace(gain=np.ones(4)).says() == "as far as measured (5.0e+10 FLOPs), extrapolated everywhere beyond"
    assert of._replace(gain=-gains).says() == (
        "nowhere as far as measured (5.0e+10 FLOPs) and extrapolated from 1.0e+12 FLOPs on"
    )
    late = of._replace(gain=np.array([-1, 1, 1, -1]))
    assert late.says() == "from 1.0e+10 FLOPs as far as measured (5.0e+10 FLOPs), extrapolated up to 1.0e+11"
    assert of._replace(measured=1e11).says() == "up to 1.0e+11 FLOPs"


def test_where_distillation_wins_is_said_in_words_that_do_not_contradict(found):
    compute, gains = np.array([1e9, 1e10]), np.array([-0.1, -0.1])
    nowhere = contest.Contest(1e6, contest.SCENARIOS[0], compute, gains, gains - 0.1, gains + 0.1)
    assert fit.wins(nowhere) == "nowhere"
    assert fit.wins(nowhere._replace(gain=-gains)) == "everywhere (beyond noise: nowhere)"
    says = fit.finding(found)
    assert "distillation from a free teacher beats language modelling for the smallest student, of 100k" in says
    assert (
        "where all that the teacher cost counts, it does so nowhere as far as measured" in says and "surely" not in says
    )


def test_gains_with_most_compute_are_paired_and_said_beside_the_laws(found):
    def of(seed, loss, teacher=None, tokens=2e6):
        own = (teacher, 1.9, 1e6, 1e6, 2e6) if teacher else ()
        return Point(f"{teacher}-{seed}", 1e5, tokens, loss, 2e5, *own)._replace(seed=seed)

    alone = [of("0", 3.0), of("1", 3.2), of("0", 2.8, tokens=4e6)]
    taught = [of("0", 2.9, "big"), of("1", 3.1, "big"), of("0", 2.95, "small"), of("1", 3.3, "small")]
    says = curves.last_gains(replace(found, points=[*alone, *taught]))
    assert says.startswith("With most compute measured, a free teacher gains +0.100 ± 0.000 (N = 100k, 1.2e+12 FLOPs)")
    assert "no crossing was measured" in says
    worse = [p._replace(loss=p.loss + (0.15 if p.seed == "0" else 0.1)) for p in taught]
    says = curves.last_gains(replace(found, points=[*alone, *worse]))
    assert "gains -0.025 ± 0.318, within noise (N" in says and "crossing" not in says


def test_a_student_was_measured_as_far_as_it_was_run_both_ways(found):
    own = Point("t", 1e5, 1e6, 2.0, 5.0, "t", 1.9, 1e6, teacher_tokens=2e6, teacher_flops_per_token=10.0)
    # 3 * 5 * 1e6; the teacher reads as much, and was trained on 2e6 tokens.
    assert [contest.cost(own, s) for s in contest.SCENARIOS] == [1.5e7, 2.5e7, 1.5e7 + 6e7, 2.5e7 + 6e7]
    assert contest.cost(own._replace(teacher_tokens=None), contest.SCENARIOS[2]) == 0
    short = [p for p in found.points if not p.teacher or p.parameters > SIZES[0] or p.tokens < AMOUNTS[-1]]
    free, *_, others = [c for c in contest.contests(replace(found, points=short)) if c.scenario == contest.SCENARIOS[0]]
    assert free.measured == 6 * SIZES[0] * AMOUNTS[-2] and others.measured == 6 * SIZES[-1] * AMOUNTS[-1]
    figure = curves.winners(replace(found, points=short), contest.contests(replace(found, points=short)))
    dotted, dashed, solid = figure.data[:3]
    assert dotted.line.dash == "dot" and np.nanmin(dotted.x[~np.isnan(dotted.y)]) > free.measured
    for line in (dashed, solid):
        assert np.nanmax(line.x[~np.isnan(line.y)]) <= free.measured


def test_a_teacher_of_unknown_cost_is_no_teacher_that_costs_too_much(found):
    made = contest.contests(replace(found, points=[p._replace(teacher_tokens=None) for p in found.points]))
    assert [of.known for of in made[:4]] == [True, True, False, False]
    assert made[3].says() == made[3].says(sure=True) == "unknown" != made[1].says()


def test_where_a_teacher_changes_most_it_may_hurt(monkeypatch, found):
    monkeypatch.setattr(curves, "measured", lambda found, size: [(1e11, 0.01), (6e11, -0.5)])
    assert "by +0.500 nats, and at 6.0e+11 FLOPs by +0.500" in curves.most_gained(found)


def entries(sweep: Sweep) -> list[Entry]:
    return [read(sweep.root, line) for line in sweep.runs]


def finished(sweep: Sweep, planted_points: list[Point]) -> Sweep:
    """A sweep with the results of these points, as train.py writes them."""
    for p in planted_points:
        of = {"trainer.steps": int(p.tokens / 4096), "student.size": f"{p.parameters:g}"}
        if p.teacher:
            of |= {"teacher.size": p.teacher, "teacher.steps": int(p.teacher_tokens / 1024), "teacher.batch": 4}
        sweep.done("fkl" if p.teacher else "lm", 0, p.loss, entropy=1.7, **of)
        path = sweep.root / sweep.runs[-1]["run"] / "result.json"
        result = json.loads(path.read_text())
        result |= {"non_embedding": p.parameters, "tokens": p.tokens, "flops_per_token": p.flops_per_token,
                   "teacher_non_embedding": p.teacher_parameters, "teacher_flops_per_token": p.teacher_flops_per_token,
                   "train_rows": 10**6}  # fmt: skip
        result["final"]["val/teacher_lm"] = p.teacher_loss or 1.9
        path.write_text(json.dumps(result))
    return sweep


def test_points_of_a_sweep_are_its_results(tmp_path):
    some = [planted(0)[0], *(p for p in planted(0) if p.teacher in ("small", "large"))][:30]
    sweep = finished(Sweep(tmp_path), some)
    sweep.add(["loss=jsd"]).done("lm", 1, 2.0)  # one not done, and one of a version that did not count FLOPs
    got, notes = points.of_sweep(entries(sweep))
    assert len(got) == len(some)
    for p, q in zip(some, got):
        assert q._replace(run=p.run, teacher_tokens=p.teacher_tokens, entropy=None, seed=None) == p and q.seed == "0"
    assert got[1].teacher_tokens == int(some[1].teacher_tokens / 1024) * 4 * 256
    assert "1 of 32 runs is not done" in notes[0] and "1 runs are of an earlier version" in notes[1]


def test_runs_that_no_law_is_of_are_told_of(tmp_path):
    sweep = finished(Sweep(tmp_path), [p for p in planted(0) if p.teacher == "large"][:2])
    for name, change in (("run-0", {"temperature.tau": 2.0}), ("run-1", {"data.seq_len": 1})):
        path = sweep.root / name / "result.json"
        result = json.loads(path.read_text())
        result["config"] |= change
        path.write_text(json.dumps(result | {"train_rows": 10}))
    notes = " ".join(points.of_sweep(entries(sweep))[1])
    assert "temperature.tau" in notes and "read their text more than once" in notes


def test_csv_gives_the_points_back_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "p.csv"
    points.to_csv(path, planted(0.001))
    assert points.from_csv(path) == planted(0.001)
    path.write_text(
        "parameters,tokens,loss,teacher,teacher_loss,teacher_parameters\n1e6,2e6,2.5,,,\n1e6,2e6,2.4,t,2.1,5e6\n"
    )
    a, b = points.from_csv(path)
    assert (a.run, a.flops_per_token, a.teacher) == ("2", 2e6, None) and b.teacher_flops_per_token == 1e7
    for text, says in (
        ("tokens,loss\n1,2\n", "lacks parameters"),
        ("parameters,tokens,loss\n1e6,,2\n", "line 2: tokens=nothing: need a number above 0"),
        ("parameters,tokens,loss\n1e6,1e6,nan\n", "loss=nan"),
        ("parameters,tokens,loss\n1e6,1e6,low\n", "line 2: could not convert"),
        ("parameters,tokens,loss,teacher\n1e6,1e6,2,t\n", "teacher and teacher_loss both"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(says)):
            points.from_csv(path)


def test_command_writes_page_numbers_and_points(tmp_path, capsys):
    sweep = finished(Sweep(tmp_path, "s"), planted(0.001))
    sweep.page()  # writes the manifest
    assert fit.main(["s", "--root", str(tmp_path), "--bootstrap", "5"]) == 0
    out = capsys.readouterr().out
    assert "supervised law" in out and "distillation law" in out and "known: 1.7000" in out
    assert out.strip().splitlines()[-1].startswith(f"{tmp_path / 'sweeps' / 's.fit.html'}: the irreducible loss")
    page = (tmp_path / "sweeps" / "s.fit.html").read_text().replace(get_plotlyjs(), "")
    for part in ("agreement", "isoflop", "students", "winners", "power-tokens", "power-parameters", "power-compute"):
        assert f'id="{part}"' in page
    assert page.count("held out</small>") == sum(f.held.sum() for f in answers.answers(
        "s", points.of_sweep(entries(sweep))[0], [], 0, 0).fits[:2])  # fmt: skip
    assert not re.search(r"<(script|img|iframe|source)[^>]+src=|<link|@import|url\(|https?://", page)
    numbers = json.loads((tmp_path / "sweeps" / "s.fit.json").read_text())
    first = numbers["fits"][0]
    assert first["law"] == "supervised" and set(first["coefficients"]) == set(ALONE) and first["held_out"]["runs"]
    assert numbers["distillation_wins"] and numbers["entropy"] == 1.7
    with open(tmp_path / "sweeps" / "s.points.csv") as file:
        assert len(list(csv.DictReader(file))) == len(sweep.runs)


def test_command_without_teachers_or_with_nothing(tmp_path, capsys):
    path = tmp_path / "p.csv"
    points.to_csv(path, planted(0.001, taught=False))
    assert fit.main(["--csv", str(path), "--bootstrap", "0"]) == 0
    out = capsys.readouterr().out
    assert "The distillation law cannot be fitted: no run learns from a teacher" in out
    page = (tmp_path / "p.fit.html").read_text()
    assert 'id="isoflop"' in page and 'id="winners"' not in page
    path.write_text("parameters,tokens,loss\n")
    assert fit.main(["--csv", str(path)]) == 2 and "No run of p can be used" in capsys.readouterr().err
    assert fit.main(["none", "--root", str(tmp_path)]) == 2
    assert "No sweep none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        fit.main([])


def test_nothing_is_injected(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    some = [p._replace(run=evil, teacher=evil if p.teacher == "large" else p.teacher) for p in planted(0.001)]
    page = curves.page(answers.answers("s", some, [evil], 0, 0), "x").replace(get_plotlyjs(), "")
    assert "<img" not in page and page.count("<script") == page.count("</script>")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_irreducible_loss_of_a_markov_chain_is_its_entropy(tmp_path):
    # Rows enough that all text is new, held-out text enough that its own loss is near the entropy, and no run so short
    # that it has not yet found out that the text is a chain: before that, loss follows no power of the tokens.
    common = "teacher=none logits=none data.size=1200000 data.tokens=450000 data.val_share=0.2 data.val_rows=4000 "
    common += "trainer.batch=16 trainer.micro_batch=16 trainer.val_every=1000 trainer.checkpoint_every=1000"
    runs = []
    for size in ("100k", "200k"):
        for steps in (100, 200, 400, 800):
            words = [*common.split(), f"student={size}", f"trainer.steps={steps}"]
            runs.append({"run": here(tmp_path, *words).name, "overrides": words})
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "markov.json").write_text(json.dumps({"name": "markov", "runs": runs}))
    assert fit.main(["markov", "--root", str(tmp_path), "--bootstrap", "50"]) == 0
    numbers = json.loads((tmp_path / "sweeps" / "markov.fit.json").read_text())
    found = numbers["fits"][0]["coefficients"]["E"]
    low, high = found["interval"]
    assert found["value"] == pytest.approx(numbers["entropy"], rel=0.01)
    assert 0.995 * low < numbers["entropy"] < 1.005 * high
    assert not any("more than once" in note for note in numbers["notes"])

"""Fitted laws: planted coefficients are found, held-out runs are not seen, and limits are named."""

import html
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from sweeps.fit import fitting, laws, solver
from sweeps.fit.fits import ScalingFits
from sweeps.fit.fitting import fit_all, fit_law, too_few
from sweeps.fit.laws import DISTILLATION, POWER, SUPERVISED
from sweeps.fit.observations import column
from sweeps.fit.output import as_json
from sweeps.fit.page import fit_page
from sweeps.fit.solver import Problem
from sweeps.fit.verdict import verdict
from tests.sweeps.planted import ALONE, AMOUNTS, SIZES, TAUGHT, planted, repeated


def test_planted_coefficients_are_in_their_intervals(fits):
    for fit, true in ((fits.supervised, ALONE), (fits.distillation, TAUGHT)):
        for name, value in true.items():
            low, high = fit.interval(name)
            assert low <= value <= high, (fit.law.name, name, value, fit.interval(name))
    # Intervals that hold because they are endless would say nothing.
    for fit, most in ((fits.supervised, 1.5), (fits.distillation, 6.0)):
        for name in fit.law.names:
            low, high = fit.interval(name)
            assert 0 < low < high < most * low, (fit.law.name, name, low, high)
    low, high = fits.supervised.interval("E")
    assert high - low < 0.1 and fits.supervised.held_out_error < 0.005 and fits.distillation.held_out_error < 0.005
    assert not fits.supervised.undetermined and fits.not_fitted == []


def test_without_noise_the_coefficients_are_those_planted():
    fit = fit_law(SUPERVISED, "", planted(0.0, distilled=False), draws=0, seed=0)
    assert (
        fit.coefficients == pytest.approx(ALONE, rel=0.01) and fit.held_out_error < 1e-4 and fit.interval("E") is None
    )


def test_a_fit_says_which_law_it_is_at(capsys):
    some = [p for p in planted(0.0, distilled=False) if p.parameters == SIZES[0]]
    fit_law(POWER, "over tokens", some, draws=1, seed=0, axis="tokens")
    assert capsys.readouterr().err.startswith("fitting the power law over tokens to 5 runs")


@pytest.mark.slow
def test_intervals_narrow_with_noise_and_one_seed_gives_one_answer():
    def width(noise, seed=0):
        fit = fit_law(SUPERVISED, "", planted(noise, distilled=False), draws=20, seed=seed)
        low, high = fit.interval("beta")
        return high - low

    assert width(0.0005) < width(0.005) / 3
    assert width(0.001) == width(0.001) != width(0.001, seed=1)


def test_seeds_of_one_setting_are_drawn_together():
    alone = planted(0.002, distilled=False)
    once, thrice = (fit_law(POWER, "", some, 40, 0, axis="tokens") for some in (alone, 3 * alone))
    for name in POWER.names:  # the same runs three times tell no more
        assert thrice.interval(name) == pytest.approx(once.interval(name), rel=1e-3)


@pytest.mark.parametrize("seed", [3, 4])
def test_intervals_cover_what_is_planted_where_seeds_share_an_offset(monkeypatch, seed):
    some = repeated(planted(0, distilled=False), offset=0.005, noise=0.0005, seed=seed)

    def missed():
        fit = fit_law(SUPERVISED, "", some, 20, 0)
        return [k for k, true in ALONE.items() if not fit.interval(k)[0] <= true <= fit.interval(k)[1]]

    assert not missed()
    monkeypatch.setattr(fitting, "setting_numbers", lambda runs: np.arange(len(runs)))  # as if no run shared anything
    assert missed()


def test_held_out_runs_are_the_largest_and_are_not_seen(fits):
    fit = fits.supervised
    compute = column(fit.runs, "compute")
    assert fit.held_out.sum() >= 0.2 * len(fit.runs) and compute[fit.held_out].min() > compute[~fit.held_out].max()
    # Whatever stands in the runs that are held out, the fit without them is the same, and its error on them is not.
    wrong = [p._replace(loss=2 * p.loss) if out else p for p, out in zip(fit.runs, fit.held_out)]
    again = fit_law(SUPERVISED, "", wrong, draws=0, seed=0)
    assert again.fit_coefficients == fit.fit_coefficients and again.held_out_error == pytest.approx(0.5, abs=0.01)
    alone = [p for p, out in zip(fit.runs, fit.held_out) if not out]
    assert fit_law(SUPERVISED, "", alone, draws=0, seed=0).coefficients == fit.fit_coefficients


def test_lack_of_fit_tells_a_law_that_misses_settings():
    exact = planted(0, distilled=False)
    holds, misses = (fit_law(SUPERVISED, "", repeated(exact, offset, 0.002, seed=0), 0, 0) for offset in (0.0, 0.01))
    assert holds.lack_of_fit.freedom == (20 - 6, 40) and holds.lack_of_fit.p > 0.1 and holds.lack_of_fit.within_noise
    assert misses.lack_of_fit.p < 1e-4 and not misses.lack_of_fit.within_noise
    assert "by more than the noise of seeds (lack of fit: F(14, 40) =" in misses.lack_of_fit_text
    exact_fit = fit_law(SUPERVISED, "", exact, 0, 0)
    assert exact_fit.lack_of_fit is None and exact_fit.lack_of_fit_text == ""


def test_a_straight_line_in_logarithms_stands_beside_the_error(fits):
    n, d = np.log([1e5, 1e6, 1e5, 1e6, 1e7]), np.log([1e6, 1e6, 1e7, 1e7, 1e8])
    loss, seen = 2 - 0.1 * n - 0.05 * d, np.array([True] * 4 + [False])
    assert solver.loglinear(np.stack([n, d]), loss, seen) == pytest.approx(loss)
    fit = fits.supervised
    assert fit.held_out_error < fit.loglinear_error < 0.2
    assert f"{fit.held_out_error:.2%} (straight line in logarithms: {fit.loglinear_error:.2%})" in verdict(fits)


def test_what_cannot_be_fitted_is_said():
    alone = planted(0.001, distilled=False)
    only = fit_all("x", alone, [], draws=0, seed=0)
    assert only.supervised and only.distillation is None and "no run learns from a teacher" in only.not_fitted[0]
    one = fit_all("x", [p for p in alone if p.parameters == 1e6], [], draws=0, seed=0)
    assert (
        one.supervised is None
        and "5 settings in 5 runs, 1 size and" in one.not_fitted[0]
        and set(one.powers) >= {"tokens"}
    )
    distilled = [p for p in planted(0.001) if p.teacher in (None, "large")]
    assert "2 teachers" in " ".join(fit_all("x", distilled, [], draws=0, seed=0).not_fitted)
    nothing = fit_all("x", alone[:2], [], draws=0, seed=0)
    assert nothing.fits == []


@pytest.mark.parametrize(("sizes", "amounts"), [(SIZES[:2], AMOUNTS[:2]), (SIZES[:2], AMOUNTS[:3])])
def test_a_law_needs_more_settings_than_coefficients_however_often_each_was_run(sizes, amounts):
    some = [p for p in planted(0.0, distilled=False) if p.parameters in sizes and p.tokens in amounts]
    runs = [p._replace(seed=str(seed), loss=p.loss + 0.001 * seed) for p in some for seed in range(4)]
    fits = fit_all("x", runs, [], draws=5, seed=0)
    assert fits.supervised is None and fits.distillation is None
    reason = f"at least 7 settings of at least 2 student sizes .* here: {len(some)} settings in {len(runs)} runs"
    assert re.search(reason, fits.not_fitted[0])
    headline = verdict(fits)
    assert fits.powers and headline == "only power laws could be fitted"
    # So do the settings that a teacher's students have, and those that are left where the largest are held out.
    distilled = [p for p in planted(0.0) if p.teacher and p.parameters in sizes and p.tokens in amounts[:2]]
    assert too_few([p._replace(seed=str(seed)) for p in distilled[:9] for seed in range(4)], DISTILLATION)


def test_limits_are_in_the_verdict_and_in_the_warnings():
    some = [p for p in planted(0.001, distilled=False) if p.parameters in SIZES[:2]]
    fits = fit_all("x", some, [], draws=10, seed=0)
    fit, headline = fits.supervised, verdict(fits)
    assert {"E", "A", "alpha"} <= set(fit.undetermined) and not {"B", "beta"} & set(fit.too_few_values)
    assert "irreducible loss of language modelling cannot be told from these runs" in headline
    assert "but the supervised law is fitted to 2 student sizes: an exponent needs at least 3" in headline
    assert "but 10 settings are few for the 6 coefficients of the supervised law" in headline
    assert set(fit.limits) <= set(fit.warnings)
    coefficients = as_json(fits)["fits"][0]["coefficients"]
    assert not coefficients["E"]["known"] and not coefficients["alpha"]["known"]


def test_a_coefficient_that_runs_do_not_tell_is_said():
    # Where size costs nothing, the exponent of size cannot be seen.
    blind = {**ALONE, "A": 1e-6}
    rng = np.random.default_rng(0)
    some = [p._replace(loss=laws.supervised(blind, p.parameters, p.tokens) * math.exp(0.001 * rng.normal()))
            for p in planted(0, distilled=False)]  # fmt: skip
    fit = fit_law(SUPERVISED, "", some, draws=20, seed=0)
    assert "irreducible loss of language modelling is" in verdict(ScalingFits("x", some, [], supervised=fit))
    fit.bootstrap[:] = [sample | {"E": 0.01 * 2**i} for i, sample in enumerate(fit.bootstrap)]
    assert "cannot be told" in verdict(ScalingFits("x", some, [], supervised=fit))
    unknown = ("cannot be told", "these runs do not tell it")  # by its interval, or by the end of the search
    assert "alpha" in fit.undetermined and any("alpha" in x and any(y in x for y in unknown) for x in fit.warnings)
    assert fit.coefficients["E"] == pytest.approx(ALONE["E"], rel=0.02)


def test_a_search_that_did_not_converge_is_counted_and_printed(monkeypatch):
    alone = planted(0.01, distilled=False)
    assert not any("converge" in line for line in fit_law(SUPERVISED, "", alone, draws=0, seed=0).warnings)
    for name in ("FULL", "WARM"):
        cut = getattr(solver, name)._replace(wide=(1e-3, 2), narrow=(1e-7, 3))
        for module in (solver, fitting):
            monkeypatch.setattr(module, name, cut, raising=False)
    short = fit_law(SUPERVISED, "", alone, draws=7, seed=0)
    assert not short.converged and short.unconverged == 7 == len(short.bootstrap)
    assert any("did not converge for 7 of 7 resamples" in line for line in short.warnings)
    assert any("better fit may exist" in line for line in short.warnings)


@pytest.mark.parametrize("unsure", ["held_out", "least_squares", ""])
def test_every_search_of_a_fit_has_to_converge(monkeypatch, unsure):
    alone, full_search, least_squares = planted(0.01, distilled=False), Problem.full_search, Problem.least_squares

    def search(problem):
        part = len(problem.loss) < len(alone)
        return [o._replace(converged=not (unsure == "held_out" and part)) for o in full_search(problem)]

    def squares(problem, theta):
        return least_squares(problem, theta)._replace(converged=unsure != "least_squares")

    monkeypatch.setattr(Problem, "full_search", search)
    monkeypatch.setattr(Problem, "least_squares", squares)
    fit = fit_law(SUPERVISED, "", alone, draws=0, seed=0)
    assert fit.converged is not bool(unsure)
    assert any("better fit may exist" in line for line in fit.warnings) is bool(unsure)


def test_intervals_from_draws_that_were_repeated_often_are_too_narrow():
    alone = planted(0.001, distilled=False)
    seven = [p for p in alone if p.parameters in SIZES[:2]][:7]
    for runs, expected in (
        (seven, ["13%", "7 settings", "6 distinct"]),
        (3 * seven, ["13%", "7 settings"]),
        (alone, []),
    ):
        lines = [x for x in fit_law(SUPERVISED, "", runs, draws=2, seed=0).warnings if "too narrow" in x]
        assert len(lines) == bool(expected) and all(word in lines[0] for word in expected)
    assert not any("too narrow" in line for line in fit_law(SUPERVISED, "", seven, draws=0, seed=0).warnings)


def test_a_resample_costs_few_evaluations():
    evaluations = 0

    def log(theta, inputs):
        nonlocal evaluations
        evaluations += theta.size // theta.shape[-1]
        return SUPERVISED.log(theta, inputs)

    counted = SUPERVISED._replace(log=log)
    fit_law(counted, "", planted(0.002, distilled=False), draws=0, seed=0)
    full = evaluations
    fit_law(counted, "", planted(0.002, distilled=False), draws=40, seed=0)
    draws = evaluations - 2 * full
    assert 0 < draws < 40 * 400  # about 150 each


def test_ends_of_what_was_searched_are_no_values(fits):
    fit = replace(fits.distillation, coefficients=fits.distillation.coefficients | {"gamma": 4.97, "f1": 0.01004})
    assert (fit.value_text("gamma"), fit.value_text("f1")) == ("≥ 4.97", "≤ 0.01004") and fit.at_bounds == [
        "gamma",
        "f1",
    ]
    assert {"gamma", "f1"} <= set(fit.undetermined) and any("gamma and f1" in line for line in fit.warnings)
    fit.bootstrap = [s | {"alpha": 5.0 if i % 2 else 0.8} for i, s in enumerate(fit.bootstrap)]
    assert (
        fit.interval_text("alpha") == "0.8 to ≥ 5"
        and "≥" not in fit.interval_text("beta")
        and "alpha" in fit.undetermined
    )
    page = fit_page(replace(fits, distillation=fit), "x")
    assert '<td class="bad">≥ 4.97</td>' in page and '<span class="bad">' in page
    # E is counted in units of the least loss: 0.3 % above its bound is at it.
    least = min(p.loss for p in fits.supervised.runs)
    at_end = replace(fits.supervised, coefficients=fits.supervised.coefficients | {"E": 1.003e-3 * least})
    assert at_end.at_bounds == ["E"] and not fits.supervised.at_bounds


@pytest.mark.parametrize("name", ["A", "alpha"])
def test_what_spans_more_than_an_order_of_magnitude_is_not_known(fits, name):
    fit = replace(
        fits.supervised, bootstrap=[s | {name: 0.37 * 1.2**i} for i, s in enumerate(fits.supervised.bootstrap)]
    )
    assert fit.undetermined == [name]


def test_warnings_of_all_laws_are_on_the_page_and_in_the_json(fits):
    tokens = replace(fits.powers["tokens"], unconverged=3)
    fits = replace(fits, powers=fits.powers | {"tokens": tokens})
    lines = [line for fit in fits.fits for line in fit.warnings]
    assert any(tokens.title in line and "did not converge for 3" in line for line in lines)
    page = html.unescape(fit_page(fits, "x"))
    in_json = [line for fit in as_json(fits)["fits"] for line in fit["doubts"]]
    assert in_json == lines and not [line for line in lines if line not in page]


def test_power_law_over_one_axis(fits):
    fit = fits.powers["tokens"]
    assert {p.parameters for p in fit.runs} == {max(SIZES)} and len(fit.runs) == len(AMOUNTS)
    best = fits.powers["compute"].runs
    assert all(not any(q.compute <= p.compute and q.loss < p.loss for q in fits.supervised_runs) for p in best)

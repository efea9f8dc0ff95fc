"""Formulas of scaling laws and their solver, against numbers made by hand."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from sweeps.fit import laws, solver
from sweeps.fit.laws import DISTILLATION, POWER, PUBLISHED, SUPERVISED, Law
from sweeps.fit.minimizer import huber, minimize_huber
from sweeps.fit.observations import data_of, setting_numbers
from sweeps.fit.solver import Data, Problem
from tests.sweeps.planted import ALONE, TAUGHT, planted


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


@pytest.mark.parametrize("law", [SUPERVISED, DISTILLATION], ids=lambda law: law.name)
def test_a_warm_resample_reaches_the_minimum_of_a_cold_one(law):
    runs = [run for run in planted(0.002, seed=1) if (run.teacher is None) is (law is SUPERVISED)]
    data, settings, rng = data_of(runs), setting_numbers(runs), np.random.default_rng(0)
    problem = Problem(law, data, laws.supervised(ALONE, data.n, data.d) if law is DISTILLATION else None)
    weights = np.stack([solver.resampled(settings, len(law.names), rng) for _ in range(4)])
    misfits, minimum = problem.misfits(), problem.full_search()[0].theta
    tries = problem.starts(misfits, weights, solver.WARM.tries)
    warm = np.concatenate([np.broadcast_to(minimum, (4, 1, len(minimum))), tries], axis=1)
    cold = problem.starts(misfits, weights, 60)
    for some, others in zip(problem.optima(warm, weights, solver.WARM), problem.optima(cold, weights, solver.FULL)):
        assert some[0].converged and some[0].value == pytest.approx(others[0].value, rel=1e-4)


def test_a_resample_has_as_many_settings_as_the_law_has_coefficients():
    settings, rng = np.array([0, 0, 1, 2, 3, 3]), np.random.default_rng(0)
    drawn = np.stack([solver.resampled(settings, 3, rng) for _ in range(200)])
    distinct = np.count_nonzero(drawn[:, [0, 2, 3, 4]], axis=1)
    assert set(distinct) == {3, 4} and np.allclose(drawn.sum(axis=1), 1)
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 4] == drawn[:, 5]).all()  # seeds go with their setting


def test_rows_of_a_batch_have_the_gradients_of_each():
    rng = np.random.default_rng(0)
    n, d, teacher = rng.normal(0, 2, 9), rng.normal(0, 2, 9), rng.uniform(0.6, 1.4, 9)
    supervised = rng.uniform(0.6, 1.4, (5, 9))  # differs between resamples
    theta = rng.normal(0, 0.5, (5, 9))
    value, slopes = DISTILLATION.log(theta, (n, d, teacher, supervised, np.array(1.0)))
    for row in range(5):
        alone = DISTILLATION.log(theta[row], (n, d, teacher, supervised[row], np.array(1.0)))
        np.testing.assert_allclose(value[row], alone[0], rtol=1e-12)
        np.testing.assert_allclose(slopes[row], alone[1], rtol=1e-12)


@pytest.mark.parametrize("law", [SUPERVISED, DISTILLATION], ids=lambda law: law.name)
def test_another_minimizer_finds_no_better_loss_near_the_optimum(law):
    runs = [run for run in planted(0.01, seed=2) if (run.teacher is None) is (law is SUPERVISED)]
    data = data_of(runs)
    problem = Problem(law, data, laws.supervised(ALONE, data.n, data.d) if law is DISTILLATION else None)

    def loss(theta):
        return huber(law.log(theta, problem.inputs)[0] - problem.loss, solver.DELTA).mean()

    optimum = problem.full_search()[0]
    assert optimum.converged and optimum.value == pytest.approx(loss(optimum.theta), rel=1e-12)
    for method in ("Nelder-Mead", "Powell", "L-BFGS-B"):
        other = minimize(loss, optimum.theta, method=method, bounds=problem.bounds)
        assert other.fun > optimum.value * (1 - 1e-4), method
    # They would have found a better one nearby.
    near = optimum.theta + 0.01
    assert minimize(loss, near, method="Nelder-Mead", bounds=problem.bounds).fun < loss(near) * (1 - 1e-2)


@pytest.mark.parametrize(("bound", "expected"), [(20, (10, -1)), (2, (2, -0.2))])
def test_a_step_that_its_limits_turn_uphill_is_no_convergence(bound, expected):
    # Slopes of correlation 0.9 and norms 1 and 9. From 0, the whole step is (10, -1). Cut to (2, -1), it goes uphill.
    slopes = np.array([[1.0, 0.0], [8.1, 9 * math.sqrt(1 - 0.9**2)]])
    line = Law("line", "", lambda theta, inputs: (theta @ slopes, np.broadcast_to(slopes, (1, 2, 2)).copy()), {}, {})
    limits, start = np.array([[-bound, bound]] * 2), np.zeros((1, 2))
    got = minimize_huber(line, start, (), np.array([10, -1]) @ slopes, np.ones((1, 2)), limits, (1e3,), 1e-10, 500)
    assert got.converged.all() and got.theta[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("settings", "least", "share"), [(2, 2, 1 / 2), (3, 2, 8 / 9), (4, 3, 168 / 256), (5, 1, 1)])
def test_share_of_accepted_draws_by_hand(settings, least, share):
    assert solver.accepted_share(settings, least) == pytest.approx(share)


def test_huber_by_hand():
    assert huber(np.array([0.0, 0.5, -3.0]), delta=1.0).tolist() == [0.0, 0.125, 2.5]


def test_lack_of_fit_by_hand():
    residuals, settings = np.array([0.1, 0.3, -0.1, 0.1, 0.0, 0.2]), np.array([0, 0, 1, 1, 2, 2])
    # Means 0.2, 0 and 0.1: 2 (0.04 + 0.01) / 2 against 6 * 0.01 / 3. P(F(2, 3) > f) = (1 + 2 f / 3)^(-3/2).
    got = solver.lack_of_fit(residuals, settings, np.zeros(6, int), 1)
    assert got.f == pytest.approx(2.5) and got.freedom == (2, 3)
    assert got.p == pytest.approx((1 + 5 / 3) ** -1.5) and got.within_noise
    assert solver.lack_of_fit(residuals, np.arange(6), np.zeros(6, int), 1) is None  # one seed each
    assert solver.lack_of_fit(residuals, settings, np.zeros(6, int), 3) is None
    # A shift that all runs of a seed share changes nothing, whatever it is: half the differences of the two seeds of a
    # setting are 0.1, 0.1 and 0.07, and what is left are these without their mean, with 2 degrees of freedom.
    seeds, uneven = np.array([0, 1] * 3), residuals + np.array([0, 0, 0, 0, 0, -0.06])
    shifted = solver.lack_of_fit(uneven + np.array([-0.25, 0.25] * 3), settings, seeds, 1)
    halves = np.array([0.1, 0.1, 0.07])
    pure = 2 * ((halves - halves.mean()) ** 2).sum() / 2
    means = np.array([0.2, 0.0, 0.07])
    assert shifted.freedom == (2, 2) and shifted.f == pytest.approx((2 * means**2).sum() / 2 / pure)


def test_runs_of_equal_compute_are_held_out_together():
    compute = np.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0 + 1e-9])
    each, pairs = np.arange(8), np.arange(8) // 2
    assert solver.held_out(compute, each, 2).tolist() == [False] * 6 + [True] * 2
    assert not solver.held_out(compute, each, 7).any()  # too few would be left
    assert solver.held_out(compute, pairs, 3).any() and not solver.held_out(compute, pairs, 4).any()

import math

import numpy as np
import pytest
import torch

from kd.objective.chunked import Objective
from kd.objective.temperature import soften
from tests.cases import (
    LOSSES,
    TEMPERATURES,
    TREATMENTS,
    TRUNCATIONS,
    K,
    N,
    V,
    close,
    dense,
    each,
    gradient,
    logits,
    option,
    probabilities,
    settings,
    slope,
    without_some,
)
from tests.refusals import refused


def distance(temperature, truncation=TRUNCATIONS["full"], loss=LOSSES["fkl"]):
    """Student logits, teacher logits -> loss per position, as the objective computes it."""
    whole = Objective(loss, truncation, TREATMENTS["renormalise"], temperature).distillation_loss
    return lambda student, teacher: whole(student.log_softmax(-1), dense(teacher))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def fkl(teacher, student, tau, student_tau, weight, support):
    """weight * KL(softmax(teacher[kept] / tau) || softmax(student / student_tau)[kept]) in numpy, for one position."""
    p, q = softmax(teacher[support] / tau), softmax(student / student_tau)[support]
    return weight * (p * np.log(p / q)).sum()


def fixed(teacher, student, tau, student_tau, tau2):
    return tau, student_tau, tau**2 if tau2 else 1


def normkd(teacher, student, tau):
    taus = tau * teacher.std(ddof=1), tau * student.std(ddof=1)
    return *taus, taus[0] ** 2


def wttm(teacher, student, tau):
    return tau, 1, (softmax(teacher) ** (1 / tau)).sum()


def std(teacher, student, tau):
    return tau * teacher.std(ddof=1), 1, 1


def entropy(teacher, student, tau, theta):
    p = softmax(teacher)
    return tau * 0.8 ** (theta / -(p * np.log(p)).sum()), 1, 1


NUMPY = {"fixed": fixed, "normkd": normkd, "wttm": wttm, "std": std, "entropy": entropy}


@pytest.mark.parametrize("k", [1, K, V])
@each("temperature", {name: t for name, t in TEMPERATURES.items() if t.func.__name__ in NUMPY})
def test_equals_numpy(temperature, k):
    student, teacher = logits(1), logits(2)
    actual = distance(temperature, option("truncation", "top_k", k=k))(student, teacher)
    for row, (z, y) in enumerate(zip(teacher.numpy(), student.numpy(), strict=True)):
        taus = NUMPY[temperature.func.__name__](z, y, **temperature.keywords)
        close(actual[row], fkl(z, y, *taus, support=np.argsort(-z)[:k]))


def test_numbers_worked_by_hand():
    teacher = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)  # its standard deviation is 1
    student = torch.zeros(1, 3, dtype=torch.float64)
    p = torch.tensor([1.0, 1 / math.e**2, 1 / math.e], dtype=torch.float64)  # not normalised
    target = dense(teacher)
    softening = option("temperature", "normkd", tau=2.0)(student, target)
    close(softening.teacher, [2.0])
    close(softening.weight, [4.0])
    softening = option("temperature", "wttm", tau=2.0)(student, target)
    assert softening[:2] == (2.0, 1.0)
    close(softening.weight, [(p.sqrt().sum() / p.sum().sqrt()).item()])
    softening = option("temperature", "fixed", tau=3, student_tau=2, tau2=True)(student, target)
    assert softening == (3, 2, 9)
    assert option("temperature", "fixed", tau=3, student_tau=2, tau2=False)(student, target) == (3, 2, 1)
    softening = option("temperature", "std", tau=3.0)(student, target)
    close(softening.teacher, [3.0])
    assert softening[1:] == (1.0, 1.0)
    half = dense(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log())  # an entropy of 1.5 log 2 nats
    softening = option("temperature", "entropy", tau=3.0, theta=1.5 * math.log(2))(student, half)
    close(softening.teacher, [2.4])
    assert softening[1:] == (1.0, 1.0)


@pytest.mark.parametrize("tau", [0.1, 0.5, 3.0])
@each("truncation", {"top_k": option("truncation", "top_k", k=K), "top_p": option("truncation", "top_p", p=0.9)})
def test_order_is_softmax_of_truncated_logits_over_tau(truncation, tau):
    teacher = logits(1)
    dropped = probabilities(truncation(dense(teacher))) == 0
    expected = (teacher.masked_fill(dropped, -torch.inf) / tau).softmax(-1)
    close(probabilities(TREATMENTS["renormalise"](truncation(dense(teacher))).soften(tau)), expected)
    assert dropped.any()


@each("temperature", TEMPERATURES)
def test_is_measured_before_truncation(temperature):
    student, target = logits(1).log_softmax(-1), dense(logits(2))
    seen = []

    def spy(student, target):
        seen.append(target)
        return temperature(student, target)

    Objective(LOSSES["fkl"], option("truncation", "top_k", k=1), TREATMENTS["renormalise"], spy).distillation_loss(
        student, target
    )
    assert seen == [target]


@each("temperature", TEMPERATURES)
def test_a_constant_on_all_logits_changes_nothing(temperature):
    student, teacher = logits(1), logits(2)
    close(distance(temperature)(student + 7, teacher - 5), distance(temperature)(student, teacher))


@each("truncation", {"full": TRUNCATIONS["full"], "top_k": option("truncation", "top_k", k=K)})
@each("temperature", TEMPERATURES)
def test_gradient_is_the_slope_of_the_value(temperature, truncation):
    student, teacher = logits(1), logits(2)

    def value(z):
        return distance(temperature, truncation)(z, teacher)

    close(gradient(value, student), slope(value, student), rtol=1e-5, atol=1e-7)


# An entropy is of all tokens: those that are dropped share what is left.
@each("temperature", {name: t for name, t in TEMPERATURES.items() if t.func.__name__ != "entropy"})
def test_dropped_tokens_have_no_part_in_a_temperature(temperature):
    student, whole = logits(1).log_softmax(-1), without_some(dense(logits(2)))
    many = torch.as_tensor(temperature(student, whole).teacher).expand(N)
    for row in range(N):
        support = whole.logp[row] > -torch.inf
        alone = temperature(student[row, None], dense(whole.logp[row, support][None])).teacher
        close(many[row], torch.as_tensor(alone).reshape(()).item())


def test_tau_squared_keeps_gradients_of_one_size():
    student, teacher = logits(1), logits(2)
    small, large = (
        distance(option("temperature", "fixed", tau=tau, student_tau=tau, tau2=True)) for tau in (100.0, 200.0)
    )
    close(
        gradient(lambda z: large(z, teacher), student),
        gradient(lambda z: small(z, teacher), student),
        rtol=0.1,
        atol=1e-3,
    )


def test_soften_takes_a_number_or_one_per_position():
    student = logits(1).log_softmax(-1)
    tau = torch.linspace(0.5, 3, N, dtype=torch.float64)
    close(soften(student, tau), (student / tau[:, None]).log_softmax(-1))
    close(soften(student, 2.0), soften(student, torch.full((N,), 2.0, dtype=torch.float64)))
    assert soften(student, 1.0) is student
    close(soften(student, 0.5).exp().sum(-1), torch.ones(N))


@pytest.mark.parametrize("name", ["normkd", "std", "entropy"])
def test_a_sure_or_a_uniform_teacher_gives_finite_losses(name):
    teacher = torch.stack([1000 * torch.eye(16)[0], torch.zeros(16)])
    student = logits(1, 2, 16, torch.float32)
    for truncation in (TRUNCATIONS["full"], option("truncation", "top_k", k=1)):
        value = distance(option("temperature", name), truncation)
        assert value(student, teacher).isfinite().all()
        assert gradient(lambda z, value=value: value(z, teacher), student).isfinite().all()


def test_normkd_of_a_uniform_student_is_finite():
    value = distance(option("temperature", "normkd"))
    assert gradient(lambda z: value(z, logits(1, columns=16)), torch.zeros(N, 16).double()).isfinite().all()


def test_temperature_of_an_entropy_grows_from_0_to_tau():
    sharpness = torch.tensor([1000.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.0])[:, None]
    tau = option("temperature", "entropy", tau=2.0)(torch.zeros(7, V), dense(sharpness * logits(1, 1).float())).teacher
    assert (tau.diff() > 0).all() and tau[0] == pytest.approx(1e-3)
    assert tau[-1] == pytest.approx(2 * 0.8 ** (1 / math.log(V)), rel=1e-5)
    fixed = option("temperature", "entropy", tau=2.0, theta=0.0)(torch.zeros(7, V), dense(sharpness * logits(1, 1)))
    close(fixed.teacher, torch.full((7,), 2.0))


@pytest.mark.parametrize("truncation", [TRUNCATIONS["full"], option("truncation", "top_k", k=K)])
@each("temperature", {name: t for name, t in TEMPERATURES.items() if t.func.__name__ in ("std", "entropy", "wttm")})
def test_least_is_the_softened_teacher_where_it_alone_is_softened(temperature, truncation):
    teacher = logits(1)
    tau = torch.as_tensor(temperature(teacher.log_softmax(-1), dense(teacher)).teacher).expand(N)
    support = probabilities(truncation(dense(teacher))) > 0
    soft = (teacher / tau[:, None]).masked_fill(~support, -60)  # nothing of a dropped token
    value = distance(temperature, truncation)
    close(value(soft, teacher), torch.zeros(N), atol=1e-9)
    close(gradient(lambda z: value(z, teacher), soft), torch.zeros(N, V), atol=1e-9)
    assert (value(soft + 0.1 * logits(2), teacher) > 0).all()


@pytest.mark.parametrize("theta", [-1.0, math.inf, math.nan])
def test_a_theta_below_0_is_refused_by_name(theta):
    with refused(option="temperature.theta", got=theta, need="at least 0"):
        option("temperature", "entropy", theta=theta)(logits(1).log_softmax(-1), dense(logits(2)))


@pytest.mark.parametrize("tau", [0, 0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, key) for name, node in settings("temperature").items() for key in node if key in ("tau", "student_tau")],
)
def test_a_temperature_that_is_not_above_0_is_refused_by_name(name, setting, tau):
    temperature = option("temperature", name, **{setting: tau})
    with refused(option=f"temperature.{setting}", got=tau, need="above 0"):
        temperature(logits(1).log_softmax(-1), dense(logits(2)))

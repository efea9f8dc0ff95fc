import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd import testing
from kd.config import token_info
from kd.config.components import option_files
from kd.objective import losses, truncation
from kd.objective.target import Target
from kd.objective.target_transforms import renormalise
from kd.objective.token_info import TokenInfo
from kd.rollout.mixed import returns
from tests.cases import (
    FORMS,
    LOSSES,
    V,
    close,
    dense,
    each,
    every,
    gradient,
    logits,
    on_logits,
    option,
)
from tests.refusals import refused

VARIANTS = every(
    "loss", {}, {"beta": 0.1}, {"beta": 0.9}, {"mu": 0.0}, {"mu": 0.2}, {"mu": 0.9}, {"alpha": 0.5}, {"share": 0.7},
    {"clip": 10.0}, {"single_step": False},
)  # fmt: skip
# A policy gradient has no value that means anything.
DIVERGENCES = {name: loss for name, loss in VARIANTS.items() if loss.func is not losses.minillm}


def kl(p, q):
    return (p * np.log(p / q)).sum()


def reverse(q, m):
    return kl(q, m) - q.sum() + m.sum()


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def head_share(p, q, mu):
    order = np.argsort(-p)
    head = np.cumsum(p[order]) <= mu
    head[0] = True
    gap = np.abs(p - q)[order]
    return gap[head].sum() / gap.sum()


def akl(p, q, mu):
    share = head_share(p, q, mu)
    return share * kl(p, q) + (1 - share) * reverse(q, p)


def mse(p, q):
    z, y = np.log(p), np.log(q)
    return np.mean(((y - y.mean()) - (z - z.mean())) ** 2)


# Each loss again in numpy, from its paper: teacher p and student q, over the columns that are kept.
NUMPY = {
    "fkl": kl,
    "rkl": lambda p, q: reverse(q, p),
    "jsd": jsd,
    "akl": akl,
    "skl": lambda p, q, alpha: kl(p, alpha * p + (1 - alpha) * q),
    "srkl": lambda p, q, alpha: reverse(q, alpha * q + (1 - alpha) * p),
    "tvd": lambda p, q: 0.5 * np.abs(p - q).sum(),
    "mse": mse,
    "nll": lambda p, q: -(p * np.log(q)).sum(),
}

# By hand, for p = (1/2, 1/2) and q = (1/4, 3/4).
FKL, RKL = 0.5 * math.log(4 / 3), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
HAND = {
    "fkl": FKL,
    "rkl": RKL,
    "jsd": 0.25 * math.log(16 / 15) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5),
    "akl": (FKL + RKL) / 2,
    "skl": 0.5 * math.log(0.25 / (0.275 * 0.725)),
    "srkl": 0.25 * math.log(0.25 / 0.475) + 0.75 * math.log(0.75 / 0.525),
    "tvd": 0.25,
    "mse": 0.25 * math.log(3) ** 2,
    "nll": 0.5 * math.log(16 / 3),
    "minillm": RKL - 0.25 * math.e,  # what was drawn had the log-probability -1, and the advantage 1
    "distillm2": 0.5 * math.log(0.25 / (0.275 * 0.725)),  # skl, as it is not the student's
    "atkd": 0.0,  # an easy token, with one other
}


@pytest.mark.parametrize("name", HAND)
def test_number_worked_by_hand(name):
    target = dense(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    close(LOSSES[name](student, target), [HAND[name]])


@each("form", FORMS)
@each("loss", {name: loss for name, loss in VARIANTS.items() if loss.func.__name__ in NUMPY})
def test_equals_numpy(loss, form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    actual = loss(student, target)
    for row in range(len(student)):
        support = target.logp[row] > -torch.inf
        ids = torch.arange(V)[support] if target.ids is None else target.ids[row][support]
        p, q = target.logp[row][support].exp().numpy(), student[row, ids].exp().numpy()
        if target.has_residual_column:
            p, q = (np.append(x, 1 - x.sum()) for x in (p, q))
        close(actual[row], NUMPY[loss.func.__name__](p, q, **loss.keywords))


@each("loss", DIVERGENCES)
def test_least_where_student_equals_teacher(loss):
    def entropy(target):
        p = target.align(logits(1).log_softmax(-1))[1]
        return -(p.exp() * p).sum(-1)

    testing.check_zero_at_equality(loss, entropy if loss.func.__name__ == "nll" else None)


@each("loss", DIVERGENCES)
@pytest.mark.parametrize("k", [2, 5, V])
def test_never_below_zero_after_a_truncation_that_renormalises(loss, k):
    target = renormalise(truncation.top_k(dense(logits(1)), k))
    for seed in range(1, 30):
        assert (on_logits(loss, target)(logits(seed)) > -1e-6).all()


# mse compares differences of the kept logits, which say nothing of their mass.
@each("loss", {name: loss for name, loss in DIVERGENCES.items() if loss.func is not losses.mse})
def test_truncation_does_not_pay_the_student_to_leave_the_kept_tokens(loss):
    target = renormalise(truncation.top_k(dense(logits(1)), 5))
    student = logits(2).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        on_logits(loss, target)(student).sum().backward()
        optimizer.step()
    kept_mass = student.log_softmax(-1).gather(-1, target.ids).exp().sum(-1)
    assert (kept_mass > 0.9).all()


CHECKS = (
    testing.check_shape,
    testing.check_sparse_equals_dense,
    testing.check_dropped_columns,
    testing.check_positions,
)


@pytest.mark.parametrize("check", CHECKS)
@each("loss", VARIANTS)
def test_has_what_every_loss_has(loss, check):
    check(loss)


@each("loss", VARIANTS)
def test_gradient_is_the_slope_of_the_value(loss, monkeypatch):
    if loss.func is losses.akl:  # its weights carry none: let them have one, to compare the rest
        monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)
        monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)
    testing.check_gradient(loss)


@each("form", FORMS)
def test_nll_has_the_gradient_of_fkl(form):
    target, student = form(logits(1)), logits(2)
    nll, fkl = (gradient(on_logits(LOSSES[name], target), student) for name in ("nll", "fkl"))
    close(nll, fkl)


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5])
def test_beta_of_jsd_weighs_the_teacher(beta):
    a, b = logits(1), logits(2)
    loss, mirrored = option("loss", "jsd", beta=beta), option("loss", "jsd", beta=1 - beta)
    close(on_logits(loss, dense(a))(b), on_logits(mirrored, dense(b))(a))
    small = 1e-6  # KL(p || q) is the limit of jsd / beta for a small beta
    limit = on_logits(option("loss", "jsd", beta=small), dense(a))(b) / small
    close(limit, on_logits(LOSSES["fkl"], dense(a))(b), rtol=1e-3)


@each("form", FORMS)
@pytest.mark.parametrize(
    ("name", "setting", "end"),
    [
        ("jsd", {"beta": 0}, "fkl"),
        ("jsd", {"beta": 1}, "rkl"),
        ("skl", {"alpha": 0}, "fkl"),
        ("srkl", {"alpha": 0}, "rkl"),
    ],
)
def test_ends_of_a_family(name, setting, end, form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    close(option("loss", name, **setting)(student, target), LOSSES[end](student, target))


def peaked_and_flat(columns: int = 200):
    """Positions whose head is one token, and positions whose head is a large part of the vocabulary."""
    scale = torch.tensor([[5.0], [1.0], [0.3], [0.1], [0.0]], dtype=torch.float64)
    return scale * logits(1, 5, columns), logits(2, 5, columns)


HEADS = (losses._top_mass_by_counting, losses._top_mass_by_halving)  # on a CPU, on a GPU


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mu", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_head_of_akl_is_that_of_a_full_sort(mu, head, monkeypatch):
    monkeypatch.setattr(losses, "_top_mass_by_counting", head)
    teacher, student = peaked_and_flat()
    loss = option("loss", "akl", mu=mu)
    p, q = (x.softmax(-1).numpy() for x in (teacher, student))
    expected = [akl(p[row], q[row], mu) for row in range(4)]  # in the last row all are equal, so the order is free
    close(on_logits(loss, dense(teacher))(student)[:4], expected)
    for row in range(5):  # alone, a flat position is not helped by a peaked one, nor the other way round
        alone = on_logits(loss, dense(teacher[row, None]))(student[row, None])
        close(alone[0], on_logits(loss, dense(teacher))(student)[row])


@pytest.mark.parametrize(
    ("p", "mu", "head"),
    [
        ([0.25] * 4, 0.5, 2),
        ([0.3, 0.2, 0.2, 0.15, 0.15], 0.5, 2),
        ([0.2] * 5, 0.61, 3),
        ([0.02] * 50, 0.5, 25),
        ([0.22, 0.14, 0.06, 0.04, 0.04, *[0.02] * 25], 0.5, 5),  # 0.5 in decimals, above it in float32
        ([0.6, 0.2, 0.2], 0.5, 1),
    ],
)
@pytest.mark.parametrize("find", HEADS)
def test_head_of_akl_takes_equal_tokens_until_mu(find, p, mu, head, monkeypatch):
    monkeypatch.setattr(losses, "_top_mass_by_counting", find)
    p = torch.tensor([p])
    order = torch.randperm(p.shape[-1], generator=torch.Generator().manual_seed(0))
    for probability in (p, p[:, order], torch.nn.functional.pad(p, (0, 2**14))):  # wide ones take finer bins
        assert losses._top_mass_mask(probability.log(), probability, mu).sum() == head


@pytest.mark.parametrize(("columns", "off"), [(5000, 0), (20_000, 3)])  # off: sums of thousands are in float32
@pytest.mark.parametrize("mu", [0.0, 1e-4, 0.5, 0.95])
def test_both_heads_of_akl_are_the_same_columns(mu, columns, off):
    scale = torch.tensor([[6.0], [3.0], [1.0], [0.1], [0.0]])
    logits = (scale * torch.randn(5, columns, generator=torch.Generator().manual_seed(0))).round(decimals=1)
    teacher = logits.log_softmax(-1)  # many are equal
    counted, halved = (head(teacher, teacher.exp(), mu + 1e-6) for head in HEADS)
    assert (counted != halved).sum(-1).max() <= off
    assert halved.sum(-1).min() >= 1 and halved.sum(-1).max() < columns


def test_gradient_of_mse_is_exact_in_float64():
    student = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    LOSSES["mse"](student, dense(torch.zeros(1, 3, dtype=torch.float64))).sum().backward()
    assert (student.grad - torch.tensor([[2, 0, -2]], dtype=torch.float64) / 3).abs().max() < 1e-15


def test_akl_of_equal_tokens_worked_by_hand():
    # Head: the first two tokens, whose gaps are 0.15 and 0.05 of 0.4 in all, so both directions weigh the same.
    p, q = torch.tensor([[0.25] * 4]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    forward = 0.25 * sum(math.log(0.25 / x) for x in (0.1, 0.2, 0.3, 0.4))
    backward = sum(x * math.log(x / 0.25) for x in (0.1, 0.2, 0.3, 0.4))
    close(LOSSES["akl"](q.log(), dense(p.log())), [(forward + backward) / 2])


def test_weights_of_akl_carry_no_gradient():
    teacher, student = peaked_and_flat()
    target = dense(teacher)
    forward, reverse = (gradient(on_logits(LOSSES[name], target), student) for name in ("fkl", "rkl"))
    p, q = (x.softmax(-1).numpy() for x in (teacher, student))
    share = torch.tensor([[head_share(p[row], q[row], 0.5)] for row in range(4)])
    expected = share * forward[:4] + (1 - share) * reverse[:4]
    close(gradient(on_logits(LOSSES["akl"], target), student)[:4], expected)


def test_head_of_akl_is_everything_for_mu_1():
    teacher, student = (logits(seed, 200, 1000, torch.float32) for seed in (1, 2))
    value = on_logits(option("loss", "akl", mu=1.0), dense(teacher))(student)
    close(value, on_logits(LOSSES["fkl"], dense(teacher))(student), rtol=1e-5)


def test_one_minus_tvd_is_the_overlap():
    a, b = logits(1), logits(2)
    overlap = torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1)
    close(1 - on_logits(LOSSES["tvd"], dense(a))(b), overlap)


def test_tvd_of_disjoint_distributions_is_one():
    peaks = 1000 * torch.eye(2, dtype=torch.float64)
    close(on_logits(LOSSES["tvd"], dense(peaks))(peaks.flip(0)), [1.0, 1.0])


def test_mse_counts_improbable_columns():
    teacher = torch.tensor([[0.0, -150.0]], dtype=torch.float64)
    close(on_logits(LOSSES["mse"], dense(teacher))(torch.zeros(1, 2, dtype=torch.float64)), [75.0**2])


# MiniLLM


def at_ratio(rho: float, advantage: float, clip: float = 0.2) -> tuple[float, float]:
    """The long term of minillm, and its slope by log q(y), where rho is the ratio."""
    target = dense(torch.zeros(1, 4, dtype=torch.float64))
    student = torch.tensor([[0.4, 0.1, 0.2, 0.3]], dtype=torch.float64).log()
    values = {"student_logp": math.log(0.8), "importance": 2 * rho, "advantage": advantage}
    target = replace(target, token_info=TokenInfo(**{name: torch.full((1,), x) for name, x in values.items()}))
    loss = option("loss", "minillm", clip=clip, single_step=False)
    (slopes,) = gradient(lambda log_q: loss(log_q, target), student)
    assert not slopes[1:].any()  # of the true token alone
    return loss(student, target).item(), slopes[0].item()


@pytest.mark.parametrize(
    ("rho", "advantage", "value", "steepness"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # better than expected, and likely enough by now
        (0.5, 2.0, -1.0, -1.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # worse than expected, and unlikely enough by now
        (0.0, -2.0, 1.6, 0.0),  # what the teacher drew, and the student never would have
        (0.0, 2.0, 0.0, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_ratio_is_clipped_worked_by_hand(rho, advantage, value, steepness):
    assert at_ratio(rho, advantage) == pytest.approx((value, steepness), abs=1e-6)


def test_at_ratio_1_the_gradient_is_that_of_the_return_and_of_rkl():
    target, student = dense(logits(1)), logits(2)
    log_q = student.log_softmax(-1).gather(-1, target.label[:, None])[:, 0]
    info = replace(target.token_info, student_logp=log_q, importance=torch.ones(len(log_q)))
    target, advantage = replace(target, token_info=info), info.advantage
    long = advantage[:, None] * (student.softmax(-1) - torch.nn.functional.one_hot(target.label, V))  # -A grad log q
    close(gradient(on_logits(option("loss", "minillm", single_step=False), target), student), long)
    whole = long + gradient(on_logits(LOSSES["rkl"], target), student)
    close(gradient(on_logits(LOSSES["minillm"], target), student), whole)


class Sequences:
    """All sequences of 3 of 3 tokens, with a student and a teacher that are a table of logits by what came before."""

    def __init__(self):
        self.all = torch.cartesian_prod(*[torch.arange(3)] * 3)  # [27, 3]
        before = [[tuple(row[:t]) for t in range(3)] for row in self.all.tolist()]
        prefixes = sorted({prefix for row in before for prefix in row})
        self.place = torch.tensor([[prefixes.index(prefix) for prefix in row] for row in before])  # [27, 3]
        self.student, self.teacher = logits(1, len(prefixes), 3), logits(2, len(prefixes), 3)

    def of_tokens(self, table: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of each token of each sequence [27, 3]."""
        return table.log_softmax(-1)[self.place].gather(-1, self.all[..., None])[..., 0]

    def expected_gradient(self, loss, exclude_own_reward: bool) -> torch.Tensor:
        """The mean, over what the student writes, of the gradients of the sums of minillm over tokens."""
        log_q, log_p = self.of_tokens(self.student), self.of_tokens(self.teacher)
        advantage = returns(log_p - log_q, torch.ones(27, 3), 1.0, False, exclude_own_reward)
        info = TokenInfo(student_logp=log_q, importance=torch.ones_like(log_q), advantage=advantage)
        teacher = self.teacher.log_softmax(-1)[self.place].flatten(0, 1)
        target = Target(self.all.flatten(), teacher, token_info=info.map(torch.Tensor.flatten))
        chance = log_q.sum(-1).exp()

        def mean(table: torch.Tensor) -> torch.Tensor:
            value = loss(table.log_softmax(-1)[self.place].flatten(0, 1), target)
            return (chance[:, None] * value.view(27, 3)).sum()

        return gradient(mean, self.student)

    def true_gradient(self) -> torch.Tensor:
        """Return the gradient of KL(student || teacher) over sequences."""
        log_p = self.of_tokens(self.teacher).sum(-1)

        def kl(table: torch.Tensor) -> torch.Tensor:
            log_q = self.of_tokens(table).sum(-1)
            return (log_q.exp() * (log_q - log_p)).sum()

        return gradient(kl, self.student)


def test_minillm_is_the_gradient_of_rkl_over_sequences():
    """Exactly, over all that can be written: with the single step apart, and with the return alone."""
    sequences = Sequences()
    close(sequences.expected_gradient(LOSSES["minillm"], exclude_own_reward=True), sequences.true_gradient())
    alone = option("loss", "minillm", single_step=False)
    close(sequences.expected_gradient(alone, exclude_own_reward=False), sequences.true_gradient())
    for loss, exclude in ((LOSSES["minillm"], False), (alone, True)):  # the other two count a step twice, or never
        assert (sequences.expected_gradient(loss, exclude) - sequences.true_gradient()).abs().max() > 0.1


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_importance_makes_up_for_what_the_teacher_drew(share):
    """Responses of one token, exactly: E over p~ of w A grad log q is E over q of A grad log q."""
    q, p = logits(1, 1), logits(2, 1)
    mixture = share * p.softmax(-1) + (1 - share) * q.softmax(-1)
    every = torch.arange(V)
    reward = (p.log_softmax(-1) - q.log_softmax(-1))[0]
    log_q, importance = q.log_softmax(-1)[0], (q.softmax(-1) / mixture)[0]
    info = TokenInfo(student_logp=log_q, importance=importance, advantage=reward)
    target = Target(every, p.log_softmax(-1).expand(V, V), token_info=info)
    loss = option("loss", "minillm", single_step=False, clip=1e9)
    weighted = gradient(lambda z: mixture[0] * loss(z.log_softmax(-1).expand(V, V), target), q)
    close(weighted, gradient(on_logits(LOSSES["rkl"], dense(p)), q))


# DistiLLM-2


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_distillm2_is_skl_of_the_teachers_text_and_srkl_of_the_students(beta):
    target, student = dense(logits(1)), logits(2).log_softmax(-1)
    skl, srkl = (option("loss", name, alpha=0.3)(student, target) for name in ("skl", "srkl"))
    expected = torch.tensor([beta * srkl[n] if n % 2 else (2 - beta) * skl[n] for n in range(len(skl))])
    close(option("loss", "distillm2", beta=beta, alpha=0.3)(student, target), expected)


# ATKD


THREE = [torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])]
TKD, DKD = 0.5 * math.log(4 / 3), 0.5 * math.log(9 / 8)  # by hand, of the first token


def test_target_and_diversity_terms_worked_by_hand():
    target = dense(THREE[0])
    tkd, dkd = losses._decoupled_kl(THREE[1], target)
    close(tkd, [TKD])
    close(dkd, [DKD])
    close(tkd + 0.5 * dkd, [0.25 * math.log(2)])  # fkl
    for hard, expected in ((1.0, 0.8 * (TKD + DKD)), (0.0, 0.2 * DKD)):
        marked = replace(target, token_info=TokenInfo(is_hard=torch.tensor([hard]), weight=torch.tensor([3.0])))
        close(LOSSES["atkd"](THREE[1], marked), [3 * expected])


@each("form", FORMS)
def test_fkl_is_the_target_term_and_the_others_share_of_the_diversity_term(form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    tkd, dkd = losses._decoupled_kl(student, target)
    p = target.align(student)[1].exp()
    label_mask = torch.cat([target.label_mask(), torch.zeros(len(p), p.shape[1] - target.logp.shape[1]).bool()], -1)
    others = torch.where(label_mask.any(-1), (p * ~label_mask).sum(-1), 1.0)
    close(tkd + others * dkd, LOSSES["fkl"](student, target))
    assert not tkd[~label_mask.any(-1)].any()


def test_terms_are_those_of_softmaxes_without_the_true_token():
    """Compare with the authors' formula over a whole vocabulary."""
    target, student = dense(logits(1)), logits(2)
    tkd, dkd = losses._decoupled_kl(student.log_softmax(-1), target)
    for n, label in enumerate(target.label.tolist()):
        p, q = target.logp[n].exp().numpy(), student[n].softmax(-1).numpy()
        close(tkd[n], kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]])))
        p, q = np.delete(target.logp[n].numpy(), label), np.delete(student[n].numpy(), label)
        close(dkd[n], kl(np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()))


@pytest.mark.parametrize(("teacher", "student"), [(100.0, 0.0), (0.0, 100.0), (100.0, 100.0), (100.0, -100.0)])
def test_terms_of_a_sure_teacher_or_student_are_finite_and_have_gradients(teacher, student):
    """Compute in float32, where 1 - p of the true token is 0 to the last digit."""
    at = torch.eye(1, V)
    p, q = logits(1, 1, dtype=torch.float32) + teacher * at, logits(2, 1, dtype=torch.float32) + student * at
    target = dense(p)
    _, dkd = losses._decoupled_kl(q.log_softmax(-1), target)
    close(
        dkd,
        losses._decoupled_kl(logits(2, 1, dtype=torch.float32).log_softmax(-1), dense(p - teacher * at))[1],
        rtol=1e-3,
    )
    slopes = gradient(lambda z: losses._decoupled_kl(z.log_softmax(-1), target)[1], q)
    assert slopes.isfinite().all() and slopes[:, 1:].abs().max() > 0.01
    assert all(x.isfinite().all() for x in losses._decoupled_kl(q.log_softmax(-1), target))


def test_the_true_token_alone_is_all_target_term():
    whole, student = dense(torch.eye(1, V).double() * 50), logits(2, 1).log_softmax(-1)
    dropped = replace(whole, logp=whole.logp.masked_fill(torch.arange(V) > 0, -torch.inf))
    for target in (truncation.top_k(whole, 1), dropped):
        tkd, dkd = losses._decoupled_kl(student, renormalise(target))
        close(tkd, -student[:, 0])
        close(dkd, [0.0])


@pytest.mark.parametrize("name", sorted(path.stem for path in option_files("loss")))
def test_a_loss_reads_the_token_information_that_it_declares(name):
    """Compute the loss with all declared fields; without any one of them it fails."""
    target, student = dense(logits(1)), logits(2).log_softmax(-1)
    needed = {field: target.token_info.provided()[field] for field in token_info.needs(name)}
    whole = LOSSES[name](student, target)
    assert torch.equal(LOSSES[name](student, replace(target, token_info=TokenInfo(**needed))), whole)
    for field in needed:
        less = TokenInfo(**{other: x for other, x in needed.items() if other != field})
        with pytest.raises((TypeError, AttributeError)):
            LOSSES[name](student, replace(target, token_info=less))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("jsd", "beta", -0.1), ("jsd", "beta", 1.1), ("jsd", "beta", math.nan), ("akl", "mu", -0.1), ("akl", "mu", 1.5),
     ("skl", "alpha", 1.0), ("skl", "alpha", -0.1), ("srkl", "alpha", 1.0), ("srkl", "alpha", -0.1),
     ("minillm", "clip", -0.1), ("minillm", "clip", math.nan), ("distillm2", "beta", -0.1), ("distillm2", "beta", 2.1),
     ("distillm2", "alpha", 1.0), ("atkd", "share", -0.1), ("atkd", "share", 1.1)],
)  # fmt: skip
def test_a_setting_without_meaning_is_refused_by_name(name, setting, value):
    loss = option("loss", name, **{setting: value})
    with refused(option=f"loss.{setting}", got=value, need=" "):
        loss(logits(1).log_softmax(-1), dense(logits(2)))

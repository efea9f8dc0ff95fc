import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd.config.components import build
from kd.config.groups import Component
from kd.config.rules import not_linear
from kd.experiment.dependencies import Plan
from kd.objective import truncation
from kd.objective.chunked import Objective
from kd.objective.target import Target
from kd.objective.target_transforms import renormalise
from kd.objective.truncation import uniform
from tests.cases import (
    FORMS,
    LOSSES,
    TRUNCATIONS,
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
    shuffled,
    without_some,
)
from tests.refusals import refused
from tests.small import small_config as typed

ODDS = 1e-6  # of a correct sampler failing a test here, if the seeds were not fixed


def four(*p: float) -> Target:
    return dense(torch.tensor([p or (0.3, 0.1, 0.4, 0.2)], dtype=torch.float64).log())


def copies(seed: torch.Tensor, columns: int = V) -> Target:
    """Return one position len(seed) times, under different seeds."""
    logp = logits(1, 1, columns).log_softmax(-1).expand(len(seed), columns)
    return Target(torch.zeros_like(seed), logp, seed=seed)


def by_sorting(p: np.ndarray, nucleus: float = 1.0, k: int = V) -> np.ndarray:
    """One row of top_p_k in numpy, not renormalised."""
    order = np.argsort(-p)
    reaching = 1 + np.flatnonzero(np.append(np.cumsum(p[order])[:-1] >= nucleus, True))[0]
    out = np.zeros_like(p)
    out[order[: min(reaching, k)]] = p[order[: min(reaching, k)]]
    return out


def odds(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the probability of counts at least this far from the expected ones, by a chi-square test."""
    chi2 = ((counts - expected) ** 2 / expected).sum().double()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), chi2 / 2).item()


def agree(actual: Target, expected: Target) -> None:
    close(probabilities(actual), probabilities(expected))
    assert actual.has_residual_column == expected.has_residual_column


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("top_k", {"k": 1}, [0, 0, 0.4, 0]),
        ("top_k", {"k": 2}, [0.3, 0, 0.4, 0]),
        ("top_k", {"k": 4}, [0.3, 0.1, 0.4, 0.2]),
        ("top_p", {"p": 0.01}, [0, 0, 0.4, 0]),
        ("top_p", {"p": 0.39}, [0, 0, 0.4, 0]),
        ("top_p", {"p": 0.41}, [0.3, 0, 0.4, 0]),
        ("top_p", {"p": 0.69}, [0.3, 0, 0.4, 0]),
        ("top_p", {"p": 0.71}, [0.3, 0, 0.4, 0.2]),
        ("top_p", {"p": 0.91}, [0.3, 0.1, 0.4, 0.2]),
        ("top_p_k", {"p": 0.71, "k": 2}, [0.3, 0, 0.4, 0]),
        ("top_p_k", {"p": 0.39, "k": 2}, [0, 0, 0.4, 0]),
    ],
)
def test_tokens_kept_by_hand(name, setting, expected):
    expected = torch.tensor([expected], dtype=torch.float64)
    cut = option("truncation", name, **setting)(four())
    close(probabilities(cut, 4), expected)
    close(probabilities(renormalise(cut), 4), expected / expected.sum())


def test_top_p_of_exactly_p_needs_no_further_token():
    close(probabilities(option("truncation", "top_p", p=0.5)(four(0.25, 0.5, 0.125, 0.125)), 4), [[0, 0.5, 0, 0]])


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("k", [1, 3, V])
def test_nucleus_is_the_smallest_set_that_reaches_p_then_at_most_k(p, k, form):
    target = dense(logits(1)) if form == "dense" else shuffled(dense(logits(1)), V)
    expected = torch.stack([torch.from_numpy(by_sorting(row, p, k)) for row in dense(logits(1)).logp.exp().numpy()])
    close(probabilities(option("truncation", "top_p_k", p=p, k=k)(target)), expected)
    if k == V:
        close(probabilities(option("truncation", "top_p", p=p)(target)), expected)
    if p == 1:
        close(probabilities(option("truncation", "top_k", k=k)(target)), expected)


@pytest.mark.parametrize(
    ("name", "setting"), [("full", {}), ("top_k", {"k": V}), ("top_p", {"p": 1}), ("top_p_k", {"p": 1.0, "k": V})]
)
def test_everything_can_be_kept(name, setting):
    for scale in (1, 10):  # at 10 some probabilities are too small to move a float32 sum
        target = dense((scale * logits(1)).float())
        truncated = option("truncation", name, **setting)(target)
        assert ((probabilities(truncated) > 0) == (probabilities(target) > 0)).all()
        close(probabilities(truncated), probabilities(target), rtol=1e-4, atol=0)


@each("truncation", TRUNCATIONS)
def test_what_is_kept_has_its_true_probability_but_in_a_sample(truncation):
    target = dense(logits(1))
    kept_mass = probabilities(truncation(target))
    if truncation.func.__name__ == "random":
        close(kept_mass.sum(-1), torch.ones(N))
    else:
        close(kept_mass, torch.where(kept_mass > 0, probabilities(target), 0))


@each("truncation", TRUNCATIONS)
def test_a_token_is_kept_once(truncation):
    truncated = truncation(dense(logits(1)))
    if truncated.ids is not None:
        for ids, logp in zip(truncated.ids, truncated.logp, strict=True):
            support = ids[logp > -torch.inf]
            assert len(support) == len(support.unique())


@each("truncation", TRUNCATIONS)
def test_what_was_dropped_before_stays_dropped(truncation):
    target = without_some(dense(logits(1)))
    truncated = truncation(target)
    assert (probabilities(truncated)[target.logp == -torch.inf] == 0).all()


@each("truncation", TRUNCATIONS)
def test_does_not_depend_on_the_other_positions(truncation):
    target = dense(logits(1, rows=12) * torch.logspace(-1, 1, 12)[:, None])
    whole = truncation(target)
    for rows in (slice(0, 1), slice(3, 4), slice(5, 12)):
        agree(truncation(target[rows]), whole[rows])


@each("truncation", {name: t for name, t in TRUNCATIONS.items() if t.func.__name__ != "random"})
def test_does_not_depend_on_the_order_of_columns(truncation):
    target = dense(logits(1))
    agree(truncation(shuffled(target, V)), truncation(target))


@each("truncation", TRUNCATIONS)
def test_label_seed_and_target_stay_as_they_are(truncation):
    target = FORMS["sparse"](logits(1))
    before = target.logp.clone()
    truncated = truncation(target)
    close(truncated.label, target.label)
    close(truncated.seed, target.seed)
    close(target.logp, before)


def test_random_counts_draws():
    draws = 20
    sampled = option("truncation", "random", draws=draws)(dense(logits(1)))
    counts = probabilities(sampled) * draws
    close(counts, counts.round(), atol=1e-5)
    close(counts.sum(-1), torch.full((N,), float(draws)))


def test_random_is_a_function_of_the_seed():
    random = option("truncation", "random", draws=5)
    target = copies(torch.tensor([7, 8, 7, 7 + 2**40]))
    p = probabilities(random(target))
    assert (p[0] == p[2]).all()
    assert (p[0] != p[1]).any()
    assert (p[0] != p[3]).any()
    agree(random(target), random(target))


def test_random_from_a_sure_teacher_is_sure():
    target = dense(100 * torch.eye(V, dtype=torch.float64))
    close(probabilities(option("truncation", "random", draws=9)(target)), torch.eye(V))


def test_random_of_a_store_draws_in_proportion():
    target = replace(copies(torch.arange(4000)), ids=torch.arange(V).expand(4000, V))
    part = replace(target, logp=target.logp[:, :4], ids=target.ids[:, 3:7])
    mean = probabilities(option("truncation", "random", draws=10)(part)).mean(0)
    expected = target.logp[0, :4].softmax(-1)
    close(mean[3:7], expected, atol=6 * 0.5 / 40_000**0.5)
    assert mean[:3].sum() + mean[7:].sum() == 0


SEEDS = {
    "neighbours": torch.arange(4000),
    "high-bits": torch.arange(4000) << 32,
    "any": torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 4000)),
}


@each("seed", SEEDS)
@pytest.mark.parametrize("draws", [1, 10])
def test_random_is_unbiased(seed, draws):
    target = copies(seed)
    drawn = probabilities(option("truncation", "random", draws=draws)(target)).sum(0) * draws
    expected = target.logp[0].exp() * draws * len(seed)
    assert odds(drawn, expected) > ODDS


@each("seed", SEEDS)
def test_random_has_the_variance_of_independent_draws(seed):
    draws, target = 10, copies(seed)
    p = target.logp[0].exp()
    variance = probabilities(option("truncation", "random", draws=draws)(target)).var(0)
    expected = p * (1 - p) / draws
    excess = (1 - 6 * p * (1 - p)) / (draws * p * (1 - p))  # kurtosis of a binomial
    assert ((variance - expected).abs() < 5 * expected * ((2 + excess) / len(seed)).sqrt()).all()


def test_mean_gradient_from_random_targets_is_that_of_the_whole_teacher():
    target = copies(SEEDS["any"])
    student = logits(2, 1).expand(len(target.logp), V)
    fkl = LOSSES["fkl"]
    whole = gradient(lambda z: fkl(z.log_softmax(-1), target[:1]), student[:1])[0]
    sampled = option("truncation", "random", draws=5)(target)
    grads = gradient(lambda z: fkl(z.log_softmax(-1), sampled), student)
    p = target.logp[0].exp()
    error = (p * (1 - p) / (5 * len(grads))).sqrt()  # the gradient is student - count / draws
    close(grads.std(0), error * len(grads) ** 0.5, rtol=0.1, atol=0.01)
    assert ((grads.mean(0) - whole).abs() < 5 * error).all()
    assert (error < 0.1 * whole.abs().max()).all()


def evenly(bins: torch.Tensor, count: int) -> float:
    return odds(bins.flatten().bincount(minlength=count), torch.full((count,), bins.numel() / count))


@each("seed", SEEDS)
def test_uniform_numbers_look_uniform(seed):
    u = uniform(seed, 20)
    assert u.dtype == torch.float64
    assert ((u > 0) & (u < 1)).all()
    assert evenly((u * 1000).long(), 1000) > ODDS
    assert min(evenly((u[:, j] * 64).long(), 64) for j in range(20)) > ODDS
    assert evenly((u * 2**16 % 1 * 64).long(), 64) > ODDS  # the low bits as well


@each("seed", SEEDS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (256, 0)], ids=lambda shift: str(shift)
)
def test_uniform_numbers_look_independent_of_their_neighbours(seed, rows, columns):
    u = uniform(seed, 20)
    here, neighbours = u[rows:, max(0, -columns) : 20 - max(0, columns)], u[: len(u) - rows, max(0, columns) :]
    neighbours = neighbours[:, : here.shape[1]]
    assert evenly((here * 16).long() * 16 + (neighbours * 16).long(), 256) > ODDS
    assert (here == neighbours).double().mean() < 1e-4


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("top_k", "k", 0), ("top_k", "k", -1), ("top_k", "k", V + 1), ("top_p_k", "k", 0), ("top_p_k", "k", V + 1),
     ("top_p", "p", 0.0), ("top_p", "p", -0.5), ("top_p", "p", 1.5), ("top_p", "p", float("nan")),
     ("top_p_k", "p", 0.0), ("top_p_k", "p", 1.01), ("random", "draws", 0), ("random", "draws", -3)],
)  # fmt: skip
def test_a_setting_without_meaning_is_refused_by_name(name, setting, value):
    changes = ({"k": 5} if name == "top_p_k" else {}) | {setting: value}
    truncation = option("truncation", name, **changes)
    with refused(option=f"truncation.{setting}", got=value, hint=f"type truncation.{setting}="):
        truncation(dense(logits(1)))


# Many columns are looked at block by block.


@pytest.mark.parametrize("columns", [truncation.BLOCK * 8, truncation.BLOCK * 8 + 1, 2047])
def test_the_largest_of_many_columns_are_those_of_a_full_sort(columns):
    logp = logits(3, 20, columns, torch.float32).log_softmax(-1)
    logp[:, ::3] = -torch.inf
    values, place = truncation._largest(logp, 2)
    expected = logp.sort(descending=True)
    assert torch.equal(values, expected.values[:, :2]) and torch.equal(place, expected.indices[:, :2])


@pytest.mark.parametrize("columns", [truncation.BLOCK * 3, 1000, 20_000])
def test_draws_from_many_columns_are_those_of_one_running_sum(columns):
    probability = logits(4, 12, columns).softmax(-1)
    probability[:, 1::2] = 0  # dropped columns are never drawn
    probability[5, truncation.BLOCK :] = 0
    points = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[:, 0] = 1 - 1e-12
    ends = probability.cumsum(-1)
    expected = torch.searchsorted(ends, points * ends[:, -1:], right=True)
    sampled = truncation.inverse_cdf_sample(probability, points)
    assert torch.equal(sampled, expected) and (probability.gather(-1, sampled) > 0).all()


# Which gradients a sample leaves unbiased: all possible draws, weighed by their probabilities, against the rule.

DRAWS = torch.tensor(list(itertools.product(range(4), repeat=3)))  # [64, 3], of 4 tokens


def nodes(group: str, *changes: dict) -> dict[str, dict]:
    """Each option of a group, and once more with each of the changes to settings that it has."""
    by_name = {}
    for name, node in settings(group).items():
        for change in ({}, *changes):
            new = {k: v for k, v in change.items() if k in node}
            by_name["-".join([name, *(f"{k}={v}" for k, v in new.items())])] = node | new
    return by_name


LOSS_NODES = nodes(
    "loss", {"beta": 0.0, "alpha": 0.0, "mu": 1.0, "single_step": False, "share": 0.0, "clip": 0.0},
    {"beta": 1.0, "mu": 0.0, "share": 1.0}, {"alpha": 0.0}, {"beta": 0.0},
)  # fmt: skip
TEMPERATURE_NODES = nodes(
    "temperature", {"tau": 1.0}, {"student_tau": 2.0, "tau2": True}, {"tau": 2.0}, {"tau": 1.0, "theta": 0.0}
)


def gradients(objective: Objective, student: torch.Tensor, target: Target) -> torch.Tensor:
    return gradient(lambda z: objective.distillation_loss(z.log_softmax(-1), target), student)


@each("loss", LOSS_NODES)
def test_unbiased_is_what_has_the_gradient_of_the_whole_teacher_in_the_mean(loss):
    student, teacher = logits(1, columns=4), logits(2, columns=4)
    rows = torch.arange(N).repeat_interleave(len(DRAWS))
    draws = DRAWS.repeat(N, 1)
    one = replace(dense(teacher), label=torch.arange(N) % 4, complete=True)
    weight = teacher.log_softmax(-1)[rows].gather(-1, draws).sum(-1).exp()[:, None]
    makes = build(loss, "loss")
    for (a, temperature), (b, target) in itertools.product(TEMPERATURE_NODES.items(), nodes("target").items()):
        if b in ("rest", "leftover"):
            continue  # refused with a sample
        ways = build(target, "target"), build(temperature, "temperature")
        whole = gradients(Objective(makes, truncation.full, *ways), student, one)
        sampled = Objective(makes, lambda target: truncation._sampled(target, draws), *ways)
        mean = (weight * gradients(sampled, student[rows], one[rows])).view(N, len(DRAWS), 4).sum(1)
        unbiased = torch.allclose(mean, whole, rtol=1e-9, atol=1e-12)
        assert unbiased == (not not_linear(*map(Component.from_node, (loss, temperature, target)))), (a, b)


SIGNALS = ("logits=online", "logits=offline", "logits=recorded", "logits=cotrained")
BIASED = ("loss=rkl", "loss=jsd alpha.peak=0.3", "temperature.tau=2", "target=revise", "loss=nll temperature=std")


@each(
    "case",
    {f"{source} {words}": (source, words) for source in SIGNALS for words in BIASED},
    fast={
        f"{source} {words}": 1 for source in SIGNALS for words in BIASED if SIGNALS[0] == source or BIASED[0] == words
    },
)
def test_a_biased_sample_is_refused_unless_it_is_accepted(tmp_path, case):
    source, words = case
    words = [source, "truncation=random", *words.split()]
    with refused(option="truncation", got="random", why="biased", hint="truncation.biased=true") as caught:
        typed(tmp_path, *words)
    group = {"temperature.tau=2": "temperature=fixed", "loss=nll": "temperature=std"}.get(words[2], words[2])
    assert caught.value.conflict.startswith(group)
    typed(tmp_path, *words, "truncation.biased=true")


def test_accepting_a_bias_changes_neither_names_nor_stores(tmp_path):
    for source in ("logits=online", "logits=offline", "logits=recorded"):
        words = [source, "truncation=random", "truncation.draws=9"]
        usual, accepted = typed(tmp_path, *words), typed(tmp_path, *words, "truncation.biased=true")
        assert (
            Plan.from_config(usual).run.name == Plan.from_config(accepted).run.name
            and Plan.from_config(usual).store == Plan.from_config(accepted).store
        )


def test_an_unbiased_sample_and_one_that_nothing_reads_are_not_refused(tmp_path):
    for words in (["loss=nll"], ["temperature.student_tau=2"], ["loss=jsd", "loss.beta=0"], ["alpha.peak=0.5"]):
        typed(tmp_path, "truncation=random", *words)
    typed(tmp_path, "logits=none", "record=random")

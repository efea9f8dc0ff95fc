"""Chunks give the sums and gradients of whole logits."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from kd.objective.chunked import Objective, chunks, default_chunk_size
from kd.objective.target import Target
from tests.cases import (
    LOSSES,
    LOSSES_BY_WAYS,
    REFUSED,
    TEMPERATURES,
    TREATMENTS,
    TRUNCATIONS,
    WAYS,
    K,
    V,
    close,
    dense,
    each,
    logits,
    option,
    pairs,
    slope,
)
from tests.objective.sums import FULL, PAIRWISE, PLAIN, ROWS, SAME, D, case, grads_of, plainly, same
from tests.refusals import refused


def test_any_two_options_meet_in_a_fast_test():
    assert len(PAIRWISE) < len(LOSSES_BY_WAYS) / 5
    assert set().union(*map(pairs, PAIRWISE.values())) == set().union(*map(pairs, LOSSES_BY_WAYS.values()))


@each("parts", LOSSES_BY_WAYS, PAIRWISE)
def test_chunked_equals_whole_logits(parts):
    head, hidden, label, target = case()
    expected = plainly(*parts, 0.7, head, hidden, label, target)
    expected_grads = grads_of(expected[0], head, hidden)
    for chunk in (4, 100):  # the last of 4 has one row
        sums = Objective(*parts, chunk)(head, hidden, label, target.__getitem__, 0.7)
        same(sums, expected)
        same(grads_of(sums.total, head, hidden), expected_grads)


@pytest.mark.parametrize("chunk", [1, 5, ROWS, 100])
def test_chunks_of_any_size_equal_whole_logits(chunk):
    head, hidden, label, target = case()
    parts = LOSSES["akl"], TRUNCATIONS["top_p_k-k=5"], TREATMENTS["leftover"], TEMPERATURES["std"]
    expected = plainly(*parts, 0.7, head, hidden, label, target)
    sums = Objective(*parts, chunk)(head, hidden, label, target.__getitem__, 0.7)
    same(sums, expected)
    same(grads_of(sums.total, head, hidden), grads_of(expected[0], head, hidden))


@pytest.mark.parametrize("chunk", [4, 100])
def test_equals_a_computation_with_torch_alone(chunk):
    head, hidden, label, target = case()
    teacher, tau = target.logp, 2.0
    z = head(hidden)
    bound = teacher.topk(K).values[:, -1:]
    p = (teacher.masked_fill(teacher < bound, -torch.inf) / tau).softmax(-1)
    kd = functional.kl_div((z / tau).log_softmax(-1), p, reduction="sum") * tau**2
    total = 0.9 * kd + 0.1 * functional.cross_entropy(z, label, reduction="sum")
    temperature = option("temperature", "fixed", tau=tau, student_tau=tau, tau2=True)
    objective = Objective(LOSSES["fkl"], option("truncation", "top_k", k=K), SAME, temperature, chunk)
    sums = objective(head, hidden, label, target.__getitem__, 0.9)
    same(sums[:2], (total, kd))
    same(grads_of(sums.total, head, hidden), grads_of(total, head, hidden))


# Positions that training can meet and that break careless arithmetic, in logits.
EXTREMES = {
    "normal": logits(5, 1),
    "spread-1000": logits(6, 1).sign() * torch.linspace(0, 500, V),
    "one-hot": 1000 * torch.eye(V)[:1].double(),
    "uniform": torch.zeros(1, V).double(),
    "two-equal": 100 * torch.eye(V)[3:5].double().sum(0, keepdim=True),
    "all-in-top-k": torch.cat([torch.full((1, K), 40.0), torch.zeros(1, V - K)], -1).double(),
}


@each("parts", LOSSES_BY_WAYS, PAIRWISE)
def test_extreme_logits_give_finite_losses_and_gradients(parts):
    every = torch.cat(list(EXTREMES.values())).float()
    student = every.repeat_interleave(len(every), 0).requires_grad_()
    target = dense(every.repeat(len(every), 1))
    value = Objective(*parts).distillation_loss(student.log_softmax(-1), target)
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert grad.isfinite().all()


@each("way", REFUSED)
def test_a_rest_is_never_softened(way):
    head, hidden, label, target = case()
    with refused(option="target", got="rest"):
        Objective(LOSSES["fkl"], *way)(head, hidden, label, target.__getitem__, 1.0)


def test_only_a_rest_with_a_temperature_is_refused():
    for _, treatment, temperature in REFUSED.values():
        assert treatment.func.__name__ == "rest"
        assert temperature.keywords["tau"] != 1 or temperature.func.__name__ != "fixed"
    assert any(treatment.func.__name__ == "rest" for _, treatment, _ in WAYS.values())


@each("loss", LOSSES)
def test_micro_batches_add_up(loss):
    head, hidden, label, target = case()
    objective = Objective(loss, FULL, SAME, PLAIN, 4)
    whole = objective(head, hidden, label, target.__getitem__, 0.7)
    parts = [objective(head, hidden[rows], label[rows], target[rows].__getitem__, 0.7) for rows in chunks(ROWS, 3)]
    same([sum(values) for values in zip(*parts, strict=True)], whole)
    total = sum(part.total for part in parts)
    same(grads_of(total, head, hidden), grads_of(whole.total, head, hidden))


def test_every_token_counts_the_same():
    """KL of 1 on one token and of 3 on three tokens is 2.5 per token, not 2, however they are split."""
    head = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(head.weight)
    q = torch.tensor([-1.0, -3.0, -3.0, -3.0]).exp()
    hidden, label = torch.stack([q, 1 - q], -1).log(), torch.zeros(4, dtype=torch.long)
    target = Target(label, torch.tensor([[0.0, -torch.inf]]).expand(4, 2))
    for chunk in (1, 2, 4):
        for split in (1, 2, 4):
            parts = [
                Objective(LOSSES["fkl"], FULL, SAME, PLAIN, chunk)(
                    head, hidden[rows], label[rows], target[rows].__getitem__, 1.0
                )
                for rows in chunks(4, split)
            ]
            assert sum(part.total for part in parts).item() / 4 == pytest.approx(2.5)


def test_alpha_mixes_the_two_terms():
    head, hidden, label, target = case()
    objective = Objective(LOSSES["rkl"], FULL, SAME, PLAIN, 5)

    def at(alpha):
        sums = objective(head, hidden, label, target.__getitem__, alpha)
        return sums, grads_of(sums.total, head, hidden)

    (lm, lm_grads), (kd, kd_grads), (mixed, mixed_grads) = at(0.0), at(1.0), at(0.3)
    close(lm.total, lm.lm)
    close(kd.total, kd.kd)
    same(mixed, (0.3 * kd.total + 0.7 * lm.total, kd.total, lm.total))
    same(mixed_grads, [0.3 * k + 0.7 * m for k, m in zip(kd_grads, lm_grads, strict=True)])
    language = functional.cross_entropy(head(hidden), label, reduction="sum")
    same([lm.total, *lm_grads], [language, *grads_of(language, head, hidden)])


def test_the_parts_carry_no_gradient():
    head, hidden, label, target = case()
    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN)(head, hidden, label, target.__getitem__, 0.5)
    assert sums.total.requires_grad
    assert not sums.kd.requires_grad
    assert not sums.lm.requires_grad


def test_gradients_scale_with_the_loss():
    head, hidden, label, target = case()
    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, 4)(head, hidden, label, target.__getitem__, 0.5)
    whole = torch.autograd.grad(sums.total, hidden, retain_graph=True)[0]
    close(torch.autograd.grad(3 * sums.total / 8, hidden)[0], whole * 3 / 8, rtol=1e-6)


def test_no_positions_are_a_loss_of_zero():
    head, hidden, label, target = case()
    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN)(head, hidden[:0], label[:0], target[:0].__getitem__, 0.5)
    assert [x.item() for x in sums] == [0, 0, 0]
    assert not any(grad.any() for grad in torch.autograd.grad(sums.total, list(head.parameters())))


def test_the_teacher_gets_no_gradient():
    head, hidden, label, _ = case()
    teacher = torch.nn.Linear(D, V)

    def signal(rows):
        assert not torch.is_grad_enabled()
        return Target(label[rows], teacher(hidden[rows]).log_softmax(-1))

    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, 4)(head, hidden, label, signal, 1.0)
    sums.total.backward()
    assert teacher.weight.grad is None
    whole = Target(label, teacher(hidden).log_softmax(-1).detach())
    expected = grads_of(LOSSES["fkl"](head(hidden).log_softmax(-1), whole).sum(), head, hidden)
    same([hidden.grad, head.weight.grad, head.bias.grad], expected)


def test_a_frozen_head_leaves_the_gradient_of_hidden_states():
    head, hidden, label, target = case()
    objective = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, 4)
    expected = grads_of(objective(head, hidden, label, target.__getitem__, 0.5).total, head, hidden)
    head.requires_grad_(False)
    objective(head, hidden, label, target.__getitem__, 0.5).total.backward()
    close(hidden.grad, expected[0])
    assert head.weight.grad is None


def test_a_tied_head_gets_the_gradient_of_both_its_places():
    table = torch.nn.Embedding(V, D)
    head = torch.nn.Linear(D, V, bias=False)
    head.weight = table.weight
    ids, target = torch.arange(ROWS) % V, dense(logits(1, ROWS, dtype=torch.float32))
    whole, *_ = plainly(LOSSES["fkl"], FULL, SAME, PLAIN, 0.5, head, table(ids).tanh(), target.label, target)
    expected = torch.autograd.grad(whole, table.weight)
    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, 4)(
        head, table(ids).tanh(), target.label, target.__getitem__, 0.5
    )
    same(torch.autograd.grad(sums.total, table.weight), expected)


def test_a_bfloat16_head_is_compared_in_float32():
    head, hidden, label, target = case()
    head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    expected = plainly(LOSSES["fkl"], FULL, SAME, PLAIN, 0.5, lambda h: head(h).float(), hidden, label, target)
    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN)(head, hidden, label, target.__getitem__, 0.5)
    same(sums, expected)
    whole = torch.autograd.grad(sums.total, hidden, retain_graph=True)[0]
    seventh = torch.autograd.grad(sums.total / 7, hidden)[0]
    assert (seventh == (whole.float() / 7).bfloat16()).all()  # 1 / 7 itself is not rounded to bfloat16


@pytest.mark.parametrize("chunk", [4, ROWS])
def test_equals_whole_logits_under_autocast(chunk):
    head, hidden, label, target = case()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plainly(LOSSES["fkl"], FULL, SAME, PLAIN, 0.5, lambda h: head(h).float(), hidden, label, target)
        sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, chunk)(head, hidden, label, target.__getitem__, 0.5)
    same(sums, expected)
    grads, expected_grads = (grads_of(total, head, hidden) for total in (sums.total, expected[0]))
    for grad, whole in zip(grads, expected_grads, strict=True):
        close(grad, whole, rtol=0.02, atol=0.02 * whole.abs().max().item())


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (7, 100)])
def test_chunks_cover_every_row_once(count, size):
    pieces = [list(range(count))[rows] for rows in chunks(count, size)]
    assert [row for piece in pieces for row in piece] == list(range(count))
    assert all(0 < len(piece) <= size for piece in pieces)


def test_a_chunk_is_chosen_by_the_vocabulary():
    for vocab, rows in ((1000, 8388), (32_768, 256), (256_000, 64)):
        assert default_chunk_size(torch.nn.Linear(2, vocab, device="cpu")) == rows


@each("loss", LOSSES)
def test_chunks_change_nothing_but_rounding_under_autocast(loss):
    head, hidden, label, target = case()
    with torch.autocast("cpu", torch.bfloat16):
        results = [
            Objective(loss, FULL, SAME, PLAIN, chunk)(head, hidden, label, target.__getitem__, 0.7)
            for chunk in (3, None)
        ]
    same(*results)
    small, whole = (grads_of(sums.total, head, hidden) for sums in results)
    for a, b in zip(small, whole, strict=True):
        close(a, b, rtol=0.02, atol=0.01 * b.abs().max().item())


@each("loss", {name: loss for name, loss in LOSSES.items() if name != "akl"})  # whose weights carry no gradient
def test_gradient_is_that_of_finite_differences(loss):
    label, target = torch.arange(4), dense(logits(1, 4))
    z, objective = logits(2, 4), Objective(loss, FULL, SAME, PLAIN)

    def total(z):  # per position, in float64
        student = z.log_softmax(-1)
        return 0.7 * objective.distillation_loss(student, target) - 0.3 * student.gather(-1, label[:, None])[:, 0]

    single = replace(target, logp=target.logp.float())
    grad, _ = objective.logits_gradient(z.float(), label, single, torch.tensor(0.7))
    close(grad.double(), slope(total, z), rtol=1e-4, atol=1e-5)


def test_a_loss_whose_gradient_is_an_expanded_view_is_added_to():
    head, hidden, label, target = case()
    parts = (lambda student, target: -student.sum(-1) / student.shape[-1], FULL, SAME, PLAIN)
    expected = plainly(*parts, 0.7, head, hidden, label, target)
    ours = Objective(*parts)(head, hidden, label, target.__getitem__, 0.7)
    same(ours, expected)
    same(grads_of(ours.total, head, hidden), grads_of(expected[0], head, hidden))

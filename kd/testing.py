"""Properties that every loss has, as functions for tests: of kd's losses, and of those in a package of one's own.

    from functools import partial
    from kd import testing
    from mypackage.losses import mine

    def test_mine():
        testing.check_loss(partial(mine, alpha=0.3))

check_loss() checks all that a divergence has, and the functions below it one property each. They raise AssertionError.
Shapes as in kd/objective/target.py; numbers are float64 but for check_chunks(), which goes through Objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from kd.objective.chunked import Objective, chunks
from kd.objective.target import Target
from kd.objective.temperature import fixed
from kd.objective.token_info import TokenInfo

Loss = Callable[[Tensor, Target], Tensor]
Truncation = Callable[[Target], Target]
N, V, K = 6, 17, 5


def check_loss(loss: Loss, divergence: bool = True, constant_gradient: bool = True) -> None:
    """Check a loss: student log-probabilities [N, V], Target -> nats per position [N].

    divergence: it is least, and 0, where the student equals the teacher. constant_gradient=False: it has weights that
    carry no gradient, so that its gradient is not the slope of its value.
    """
    check_shape(loss)
    if divergence:
        check_zero_at_equality(loss)
    check_sparse_equals_dense(loss)
    check_dropped_columns(loss)
    check_positions(loss)
    if constant_gradient:
        check_gradient(loss)
    check_chunks(loss)
    check_micro_batches(loss)


def check_shape(loss: Loss) -> None:
    """Check that there is a finite value for each position, in every form of a target."""
    for name, form in FORMS.items():
        value = loss(logits(2).log_softmax(-1), form(logits(1)))
        assert value.shape == (N,), f"{name}: a value for each of {N} positions is needed, and it has {value.shape}"
        assert value.isfinite().all(), f"{name}: {value}"


def check_zero_at_equality(loss: Loss, floor: Callable[[Target], Tensor] | None = None) -> None:
    """Check that the loss is least, without a gradient, where the student equals the teacher.

    floor: the least value of each position [N]; 0 without it.
    """
    teacher = logits(1)
    for form in COMPLETE.values():
        value, target = on_logits(loss, form(teacher)), form(teacher)
        at_equality = value(teacher)
        close(at_equality, torch.zeros(N, dtype=at_equality.dtype) if floor is None else floor(target))
        close(gradient(value, teacher), torch.zeros_like(teacher), atol=1e-7)
        for seed in range(10, 20):
            assert (value(logits(seed)) > at_equality).all(), "another student has a lower value"
            assert (value(teacher + 0.01 * logits(seed)) > at_equality).all(), "a student close by has a lower value"


def check_sparse_equals_dense(loss: Loss) -> None:
    """Check that K = V columns in any order, with or without a rest, give value and gradient of a dense target."""
    target, student = dense(logits(1)), logits(2)
    for sparse in (shuffled(target, V), with_rest(shuffled(target, V))):
        close(on_logits(loss, sparse)(student), on_logits(loss, target)(student))
        close(gradient(on_logits(loss, sparse), student), gradient(on_logits(loss, target), student))


def check_dropped_columns(loss: Loss) -> None:
    """Check that a column of -inf, which a truncation dropped, is as good as absent."""
    student = logits(2, rows=3)
    for base in (dense(logits(1, rows=3)), shuffled(dense(logits(1, rows=3)), 8)):
        for whole in (without_some(base), with_rest(without_some(base))):
            value, grad = on_logits(loss, whole)(student), gradient(on_logits(loss, whole), student)
            for row in range(3):
                mask = whole.logp[row] > -torch.inf
                ids = torch.arange(V) if whole.ids is None else whole.ids[row]
                short = replace(whole[row : row + 1], logp=whole.logp[row, mask][None], ids=ids[mask][None])
                close(value[row], on_logits(loss, short)(student[row, None])[0])
                close(grad[row], gradient(on_logits(loss, short), student[row, None])[0])


def check_positions(loss: Loss) -> None:
    """Check that a position alone has the value that it has among others, as masks and splits of a batch need it."""
    target, student = dense(logits(1)), logits(2)
    value = on_logits(loss, target)(student)
    for row in range(N):
        close(on_logits(loss, target[row : row + 1])(student[row, None])[0], value[row])


def check_gradient(loss: Loss) -> None:
    """Check that the gradient is the slope of the value, by central differences."""
    student = logits(2)
    for form in FORMS.values():
        value = on_logits(loss, form(logits(1)))
        close(gradient(value, student), slope(value, student), rtol=1e-5, atol=1e-7)


def check_chunks(loss: Loss) -> None:
    """Check that chunks of any size give the sums and gradients of all positions at once."""
    expected = _summed(loss, None)
    for size in (1, 4, 100):
        _check_equal(_summed(loss, size), expected)


def check_micro_batches(loss: Loss) -> None:
    """Check that sums and gradients of the parts of a batch add up to those of the batch."""
    whole = _summed(loss, 4)
    parts = [_summed(loss, 4, rows) for rows in chunks(13, 3)]
    _check_equal([sum(part[i] for part in parts) for i in range(len(whole))], whole)


def check_nested(wide: Truncation, narrow: Truncation) -> None:
    """Check that a truncation gives the same from the columns that another keeps as from complete distributions.

    A store of the first then serves the second, as the decorator @nested of kd.objective.truncation declares.
    """
    target = dense(logits(1, rows=50))
    direct, stored = narrow(target), narrow(wide(target))
    close(_truncated_logp(stored), _truncated_logp(direct))


def _truncated_logp(target: Target) -> Tensor:
    """Return log-probabilities of all tokens [N, V], 1 for those that were dropped."""
    ids = torch.arange(V).expand_as(target.logp) if target.ids is None else target.ids
    mask = target.logp > -torch.inf
    out = target.logp.new_ones(len(target.logp), V + 1)  # the last column takes what is dropped
    return out.scatter(-1, ids.where(mask, V), target.logp.where(mask, 1.0))[:, :V]


def _summed(loss: Loss, chunk: int | None, rows: slice = slice(None)) -> list[Tensor]:
    """Return the sums of an Objective over some of 13 positions, and its gradients, all of hidden states included."""
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(size, generator=generator) for size in ((V, 6), (13, 6)))
    head = torch.nn.Linear(6, V, bias=False)
    head.weight.data = weight
    hidden, target = (4 * states).requires_grad_(), dense(logits(1, 13, dtype=torch.float32))[rows]
    objective = Objective(loss, lambda target: target, lambda target: target, fixed, chunk)
    sums = objective(head, hidden[rows], target.label, target.__getitem__, 0.7)
    return [*sums, *torch.autograd.grad(sums.total, [hidden, head.weight])]


def _check_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        close(a.double(), b.double(), rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


# Small inputs


def logits(seed: int, rows: int = N, columns: int = V, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random logits [rows, columns]."""
    return 2 * torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense(teacher: Tensor) -> Target:
    """Target that a live teacher with these logits [N, V] gives, with all that a loss can need beside it."""
    rows = torch.arange(len(teacher))
    label = rows % teacher.shape[-1]
    return Target(label, teacher.log_softmax(-1), seed=1000 + rows, token_info=token_info(len(rows), teacher.dtype))


def token_info(rows: int, dtype: torch.dtype = torch.float64) -> TokenInfo:
    """All fields for so many positions: text by both, of both kinds, some of it better than was expected."""
    place = torch.arange(rows, dtype=dtype)
    info = TokenInfo(
        student_logp=-1 - place.sin().square(), teacher_logp=-1 - place.cos().square(),
        importance=1 + place.sin() / 2, advantage=(3 * place).cos(), by_student=place % 2, is_hard=place // 2 % 2,
        weight=1 + place % 3,
    )  # fmt: skip
    assert info.provided().keys() == {field.name for field in fields(TokenInfo)}
    return info


def shuffled(target: Target, columns: int) -> Target:
    """`columns` of a dense target in random order, with true probabilities, as a store would hold them."""
    ids = torch.rand(target.logp.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :columns]
    return replace(target, logp=target.logp.gather(-1, ids), ids=ids)


def without_some(target: Target) -> Target:
    """Target with every third column dropped, another one in each row."""
    row, column = (torch.arange(size) for size in target.logp.shape)
    return replace(target, logp=target.logp.masked_fill((row[:, None] + column) % 3 == 0, -torch.inf))


def with_rest(target: Target) -> Target:
    """Target with one more column for all other tokens."""
    return replace(target, has_residual_column=True)


# Every form that a target can take, and those of them in which no probability is missing.
COMPLETE: dict[str, Callable[[Tensor], Target]] = {
    "dense": dense,
    "sparse-rest": lambda z: with_rest(shuffled(dense(z), K)),
    "dense-dropped-rest": lambda z: with_rest(without_some(dense(z))),
    "sparse-dropped-rest": lambda z: with_rest(without_some(shuffled(dense(z), K))),
}
FORMS = COMPLETE | {
    "sparse": lambda z: shuffled(dense(z), K),
    "dense-dropped": lambda z: without_some(dense(z)),
    "sparse-dropped": lambda z: without_some(shuffled(dense(z), K)),
}


def on_logits(loss: Loss, target: Target) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of the student's logits [N, V]."""
    return lambda z: loss(z.log_softmax(-1), target)


def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of the sum of value(x)."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(value(x).sum(), x)[0]


def slope(value: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Return the gradient by central differences, for a value [N] whose rows depend on their own row of x [N, V]."""
    steps = step * torch.eye(x.shape[-1], dtype=x.dtype)
    with torch.no_grad():
        return torch.stack([(value(x + s) - value(x - s)) / (2 * step) for s in steps], -1)


def close(actual: Tensor, expected: object, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Raise AssertionError unless two tensors are equal but for rounding."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

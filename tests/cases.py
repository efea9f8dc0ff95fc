"""What the tests of the mathematics share: every option of conf/, built, and small inputs.

A new yaml in conf/ is one more case of each test that loops over its group.
"""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from kd.config.components import as_record, build, option_files
from kd.errors import UserError
from kd.objective.target import Target
from kd.objective.token_info import TokenInfo

N, V, K = 6, 17, 5


def settings(group: str) -> dict[str, dict]:
    """The nodes of all options of a group."""
    nodes = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in option_files(group)}
    return {name: as_record(node) for name, node in nodes.items()} if group == "record" else nodes


def every(group: str, *changes: dict) -> dict[str, Callable]:
    """All options of conf/GROUP, built; once for each of `changes`, of which an option takes the settings it has."""
    built = {}
    for name, node in settings(group).items():
        for change in changes or ({},):
            new = {k: v for k, v in change.items() if k in node and node[k] != v}
            built["-".join([name, *(f"{k}={v}" for k, v in new.items())])] = build(node | new, group)
    return built


def option(group: str, name: str, **changes) -> Callable:
    return build(settings(group)[name] | changes, group)


def each(argument: str, cases: dict, fast: dict | None = None):
    """Run a test once for each of the cases; those outside of `fast` are slow tests."""
    slow = set() if fast is None else cases.keys() - fast.keys()
    params = [pytest.param(x, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, x in cases.items()]
    return pytest.mark.parametrize(argument, params)


def pairs(parts: tuple) -> set[tuple]:
    """Return all pairs of the parts of a case."""
    return set(itertools.combinations(parts, 2))


def pairwise(cases: dict[str, tuple]) -> dict[str, tuple]:
    """Return some of the cases, in which any two parts meet that meet in any case."""
    chosen: dict[str, tuple] = {}
    met: set[tuple] = set()
    for least in reversed(range(1, 1 + len(pairs(next(iter(cases.values())))))):  # new pairs in a case
        for name, parts in cases.items():
            if len(new := pairs(parts) - met) >= least:
                chosen[name] = parts
                met |= new
    return chosen


def logits(seed: int, rows: int = N, columns: int = V, dtype=torch.float64) -> Tensor:
    return 2 * torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense(teacher: Tensor) -> Target:
    """The target that a live teacher with these logits [N, V] gives, with all that a loss can ask for beside it."""
    rows = torch.arange(len(teacher))
    label = rows % teacher.shape[-1]
    return Target(label, teacher.log_softmax(-1), seed=1000 + rows, token_info=token_info(len(rows), teacher.dtype))


def token_info(rows: int, dtype=torch.float64) -> TokenInfo:
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
    """Every third column dropped, another one in each row."""
    row, column = (torch.arange(size) for size in target.logp.shape)
    return replace(target, logp=target.logp.masked_fill((row[:, None] + column) % 3 == 0, -torch.inf))


def with_rest(target: Target) -> Target:
    return replace(target, has_residual_column=True)


# Every form that a target can take, and those of them in which no probability is missing.
COMPLETE = {
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

LOSSES = every("loss")
TRUNCATIONS = every("truncation", {"k": K, "draws": 20})
TREATMENTS = every("target")
TEMPERATURES = every(
    "temperature", {}, {"tau": 0.5, "student_tau": 2.0}, {"tau": 2.0, "student_tau": 2.0, "tau2": True}
)


def _soft(truncation: Callable, treatment: Callable, temperature: Callable) -> bool:
    target = dense(logits(0))
    tau = temperature(target.logp, target).teacher
    try:
        treatment(truncation(target)).soften(tau)
    except UserError:
        return False
    return True


# All ways to cut, soften and treat a target, but that not every treatment meets every temperature.
_ALL = {
    f"{a}-{b}-{c}": (x, y, z)
    for a, x in TRUNCATIONS.items()
    for b, y in TREATMENTS.items()
    for c, z in TEMPERATURES.items()
    if (a.partition("-")[0] not in ("full", "random") or b not in ("rest", "leftover"))
    and (b == "renormalise" or c in ("fixed", "fixed-tau=0.5-student_tau=2.0", "entropy"))
}
WAYS = {name: way for name, way in _ALL.items() if _soft(*way)}
REFUSED = {name: way for name, way in _ALL.items() if name not in WAYS}
LOSSES_BY_WAYS = {f"{a}-{b}": (loss, *way) for a, loss in LOSSES.items() for b, way in WAYS.items()}


def probabilities(target: Target, columns: int = V) -> Tensor:
    """The target's probabilities on all tokens [N, V], without what is in the rest."""
    p = target.logp.exp()
    if target.ids is None:
        return p
    return torch.zeros(len(p), columns, dtype=p.dtype).scatter_add(-1, target.ids, p)


def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(value(x).sum(), x)[0]


def slope(value: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient by central differences, for a value [N] whose rows depend on their own row of x [N, V] alone."""
    steps = step * torch.eye(x.shape[-1], dtype=x.dtype)
    with torch.no_grad():
        return torch.stack([(value(x + s) - value(x - s)) / (2 * step) for s in steps], -1)


def close(actual, expected, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

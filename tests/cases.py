"""Shared cases of the mathematical tests: every option of conf/, built, and small inputs.

A new yaml in conf/ is one more case of each test that loops over its group.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from kd.config.components import as_record, build, option_files
from kd.errors import UserError
from kd.objective.target import Target
from kd.testing import (  # noqa: F401, for the tests that import them from here
    COMPLETE,
    FORMS,
    K,
    N,
    V,
    close,
    dense,
    gradient,
    logits,
    on_logits,
    shuffled,
    slope,
    token_info,
    with_rest,
    without_some,
)


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

"""Trial of a run's functions on a small target, which detects wrong numbers before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kd.config.schema import ExperimentConfig
from kd.data.tokenizer import vocabulary_size
from kd.errors import UserError
from kd.evaluation import metrics
from kd.objective.chunked import Objective
from kd.objective.target import Target
from kd.objective.temperature import Softening
from kd.objective.token_info import TokenInfo, needs_of

if TYPE_CHECKING:
    from kd.experiment.components import Components

POSITIONS = 2  # of the target, as of TokenInfo.example


def check(components: Components, config: ExperimentConfig) -> None:
    """Call each function once. Raises UserError for wrong numbers, and for results that training could not use."""
    components.adapter(None)  # all three refuse wrong numbers
    components.rollout(None)
    components.token_selection(lambda measure: torch.zeros(POSITIONS))
    target = _target(vocabulary_size(components.tokenizer), needs_of(components.objective.loss))
    if components.truncate is not None:
        _check_stored(components.truncate, config, target)
    _check_objective(components.objective, target)
    _check_metrics(target)
    _check_optimizer(components.optim)


def _target(vocabulary: int, needed: tuple[str, ...]) -> Target:
    """Return a complete target with the token information that a loss needs."""
    logp = torch.linspace(0, 1, POSITIONS * vocabulary).view(POSITIONS, vocabulary).sin().log_softmax(-1)
    zeros = torch.zeros(POSITIONS, dtype=torch.long)
    return Target(zeros, logp, seed=zeros, token_info=TokenInfo.example(needed))


def _check_stored(truncate: Callable[[Target], Target], config: ExperimentConfig, target: Target) -> None:
    """Raise UserError for a truncation that a store cannot hold."""
    try:
        if truncate(target).ids is None:
            why, hint = "keeps whole distributions, and a store holds columns", "return target.select(…) in it"
            raise UserError(option="truncation", got=config.stored.name, why=why, hint=hint)
    except UserError as error:
        group = "record" if config.record else "truncation"
        option, hint = (str(text).replace("truncation.", f"{group}.") for text in (error.option, error.hint))
        raise error.replace(option=option, hint=hint) from None


def _check_objective(objective: Objective, target: Target) -> None:
    """Raise UserError for a loss without a value per position, or without a gradient."""
    student = target.logp.flip(0).requires_grad_()
    # At a fixed temperature: a weight per position would give a scalar the right shape.
    fixed = replace(objective, temperature=lambda student, target: Softening(1.0, 1.0, 1.0))
    losses = fixed.distillation_loss(student, target)
    if tuple(losses.shape) != (POSITIONS,):
        got = f"a tensor of shape {list(losses.shape)} for {POSITIONS} positions"
        hint = "return one value per position, e.g. by .sum(-1) over the vocabulary"
        raise UserError(
            option="loss", why=f"does not return a value per position, but {got}",
            need="a tensor of one dimension, [N]", hint=hint,
        )  # fmt: skip
    objective.distillation_loss(student, target).sum().backward()
    if not student.grad.any():
        raise UserError(
            option="loss",
            why="has no gradient on the tokens that the truncation keeps, so that the student would learn nothing "
            "(mse compares differences of logits, and one token has none)",
            hint="keep more tokens, e.g. truncation.k=10",
        )


def _check_metrics(target: Target) -> None:
    """Raise UserError for a metric without a value per position."""
    for name, measure in metrics.against_teacher().items():
        if tuple(measure(target.logp.flip(0), target).shape) != (POSITIONS,):
            why, hint = "does not return a value per position", "return a tensor of one dimension, [N]"
            raise UserError(option=f"the metric {name}", why=why, hint=hint)


def _check_optimizer(optimizer: Callable[[list[dict]], torch.optim.Optimizer]) -> None:
    """Raise UserError for numbers that an optimizer refuses."""
    try:
        optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "width": 1}])
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # as torch says it
        raise UserError(option="optim", why=error) from None

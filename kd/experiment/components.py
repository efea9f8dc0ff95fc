"""Components of a run: the functions that its config names, built and tried before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from kd.config.schema import ExperimentConfig
from kd.data.batches import Packed
from kd.data.tokenizer import load_tokenizer, vocabulary_size
from kd.errors import UserError

FUNCTIONS = ("loss", "truncation", "target", "temperature", "routing", "alpha", "lr", "logits", "optim", "logger",
             "rollout")  # fmt: skip


def build_functions(config: ExperimentConfig) -> dict[str, Callable]:
    """Return the functions that a config names, by group. They need no data, so their mistakes are reported early.

    Raises UserError for an argument of another type, and for a schedule that leaves its range.
    """
    functions = {group: getattr(config, group).build(group) for group in FUNCTIONS}
    alphas, rates = ([functions[group](step / 100) for step in range(101)] for group in ("alpha", "lr"))
    for group, values, most, need in (
        ("alpha", alphas, 1, "a share from 0 to 1"), ("lr", rates, sys.float_info.max, "a number of at least 0"),
    ):  # fmt: skip
        for percent, value in enumerate(values):
            if not 0 <= value <= most:
                raise UserError(option=group, why=f"is {value} at {percent}% of the run", need=need)
    if config.lm == "plain" and all(alpha == 1 for alpha in alphas):
        why, hint = "would do nothing, as alpha is 1 in all steps", "type alpha.peak=0.5, or leave lm=plain out"
        raise UserError(option="lm", got="plain", why=why, hint=hint)
    return functions


class Components:
    """Functions that a config names. Each is tried once on a small random target, which detects wrong numbers early."""

    def __init__(self, config: ExperimentConfig, packed: Packed):
        import torch

        from kd.evaluation import metrics
        from kd.objective.chunked import Objective
        from kd.objective.target import Target
        from kd.objective.temperature import Softening
        from kd.objective.token_info import TokenInfo, needs_of

        built = build_functions(config)
        self.alpha, self.lr, self.logits = built["alpha"], built["lr"], built["logits"]
        self.optim, self.logger = built["optim"], built["logger"]
        self.token_selection, self.rollout = built["routing"], built["rollout"]
        # What a store keeps; None for everything.
        self.truncate = None if config.stored.is_full else config.stored.build("record")
        trainer = config.trainer
        self.objective = Objective(
            built["loss"], built["truncation"], built["target"], built["temperature"], trainer.chunk, trainer.compile
        )
        self.tokenizer = load_tokenizer(str(packed.tokenizer), "The tokenizer of the packed data")
        vocab = vocabulary_size(self.tokenizer)
        logp = torch.linspace(0, 1, 2 * vocab).view(2, vocab).sin().log_softmax(-1)
        self.rollout(None)  # both refuse wrong numbers
        self.token_selection(lambda measure: torch.zeros(2))
        zeros = torch.zeros(2, dtype=torch.long)
        target = Target(zeros, logp, seed=zeros, token_info=TokenInfo.example(needs_of(built["loss"])))
        if self.truncate is not None:
            try:
                if self.truncate(target).ids is None:
                    why, hint = "keeps whole distributions, and a store holds columns", "return target.select(…) in it"
                    raise UserError(option="truncation", got=config.stored.name, why=why, hint=hint)
            except UserError as error:
                group = "record" if config.record else "truncation"
                option, hint = (str(text).replace("truncation.", f"{group}.") for text in (error.option, error.hint))
                raise error.replace(option=option, hint=hint) from None
        student = logp.flip(0).requires_grad_()
        # At a fixed temperature: a weight per position would give a scalar the right shape.
        fixed = replace(self.objective, temperature=lambda student, target: Softening(1.0, 1.0, 1.0))
        losses = fixed.distillation_loss(student, target)
        if tuple(losses.shape) != (2,):
            why, got = "does not return a value per position", f"a tensor of shape {list(losses.shape)} for 2 positions"
            hint = "return one value per position, e.g. by .sum(-1) over the vocabulary"
            raise UserError(option="loss", why=f"{why}, but {got}", need="a tensor of one dimension, [N]", hint=hint)
        self.objective.distillation_loss(student, target).sum().backward()
        if not student.grad.any():
            raise UserError(
                option="loss",
                why="has no gradient on the tokens that the truncation keeps, so that the student would learn nothing "
                "(mse compares differences of logits, and one token has none)",
                hint="keep more tokens, e.g. truncation.k=10",
            )
        for name, measure in metrics.against_teacher().items():
            if tuple(measure(student.detach(), target).shape) != (2,):
                why, hint = "does not return a value per position", "return a tensor of one dimension, [N]"
                raise UserError(option=f"the metric {name}", why=why, hint=hint)
        try:
            self.optim([{"params": [torch.nn.Parameter(torch.zeros(1))], "width": 1}])
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # as torch says it
            raise UserError(option="optim", why=error) from None

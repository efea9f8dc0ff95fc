"""Components of a run: the functions that its config names, built and tried before anything is trained.

This module imports no torch, so that mistakes in a config are reported fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from kd.config.schema import ExperimentConfig
from kd.data.batches import Packed
from kd.data.tokenizer import load_tokenizer
from kd.errors import UserError

FUNCTIONS = ("loss", "truncation", "target", "temperature", "routing", "alpha", "lr", "logits", "optim", "adapter",
             "logger", "rollout")  # fmt: skip


def build_functions(config: ExperimentConfig) -> dict[str, Callable]:
    """Return the functions that a config names, by group. They need no data, so their mistakes are reported early.

    Raises UserError for an argument of another type, and for a schedule that leaves its range.
    """
    functions = {group: getattr(config, group).build(group) for group in FUNCTIONS}
    alphas, rates = over_run(functions["alpha"]), over_run(functions["lr"])
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


def over_run(schedule: Callable[[float], float]) -> list[float]:
    """Return the values of a schedule at 0%, 1%, …, 100% of the run."""
    return [schedule(step / 100) for step in range(101)]


class Components:
    """Functions that a config names, from build_functions(), and the tokenizer. Each function is tried once."""

    def __init__(self, config: ExperimentConfig, packed: Packed, functions: dict[str, Callable]):
        from kd.experiment import trial
        from kd.objective.chunked import Objective

        self.alpha, self.lr, self.logits = functions["alpha"], functions["lr"], functions["logits"]
        self.optim, self.adapter, self.logger = functions["optim"], functions["adapter"], functions["logger"]
        self.token_selection, self.rollout = functions["routing"], functions["rollout"]
        # What a store keeps; None for everything.
        self.truncate = None if config.stored.is_full else config.stored.build("record")
        self.objective = Objective(
            functions["loss"], functions["truncation"], functions["target"], functions["temperature"],
            config.trainer.chunk,
        )  # fmt: skip
        self.tokenizer = load_tokenizer(str(packed.tokenizer), "The tokenizer of the packed data")
        trial.check(self, config)

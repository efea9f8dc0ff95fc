"""Config of a run as one frozen tree, which is built once from the yaml files and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from omegaconf import DictConfig

from kd import former_names
from kd.config import components, nodes, rules
from kd.config.fields import ConfigNode, Traits, all_traits, scalars, seed_setting, setting
from kd.config.groups import (
    AdapterConfig,
    Component,
    DataConfig,
    InitConfig,
    LogitsConfig,
    ModelConfig,
    ResponsesConfig,
    RolloutConfig,
    TeacherConfig,
    TrainerConfig,
    TruncationConfig,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentConfig(ConfigNode):
    """All options of a run. Hashed by identity, so that each config gets its plan once."""

    seed: int = seed_setting()
    root: str = setting(effect=False)
    record: TruncationConfig | None
    scale: str = setting(default="cpu", effect=False)
    token_names: Literal["same", "any"] = setting(default="same", effect=False)
    lm: Literal["data", "plain"]
    sweep: str | None = setting(effect=False)
    n_jobs: int | None = setting(default=None, effect=False, least=1)
    plan: bool = setting(default=False, effect=False)
    force: bool = setting(default=False, effect=False)
    on_failure: Literal["continue", "stop"] = setting(default="continue", effect=False)
    benchmarks: str | list | None = setting(default=None, effect=False)
    push_to_hub: str | None = setting(default=None, effect=False)
    data: DataConfig
    teacher: TeacherConfig
    responses: ResponsesConfig
    plain: Component = setting(identity=False)
    start: InitConfig = setting(identity=False)
    logits: LogitsConfig
    truncation: TruncationConfig = setting(needs_signal=True)
    target: Component = setting(needs_signal=True)
    temperature: Component = setting(needs_signal=True)
    routing: Component = setting(needs_signal=True)
    rollout: RolloutConfig
    loss: Component = setting(needs_signal=True)
    alpha: Component = setting(needs_signal=True)
    lr: Component
    optim: Component
    student: ModelConfig
    adapter: AdapterConfig = setting(default=AdapterConfig(target="kd.models.adapters.none"), neutral="none")
    trainer: TrainerConfig
    logger: Component = setting(effect=False)

    @classmethod
    def from_hydra(cls, cfg: DictConfig, overrides: list[str]) -> Self:
        """Build the config that Hydra composed of `overrides`; raise UserError for options that no run can have."""
        node = nodes.to_node(cfg)
        components.check_targets(node)
        rules.check_deletions(overrides)
        config = cls.from_node(node)
        rules.check_values(config)
        rules.check_steps(config, overrides)
        config = config.resolved()
        rules.check_all(config, overrides)
        return config

    @classmethod
    def from_dict(cls, node: Mapping[str, Any]) -> Self:
        """Build a config from the dict of to_dict(), also of an older version; raise UserError for any other dict."""
        node = former_names.current_config(dict(node))
        components.check_targets(node)
        config = cls.from_node(node)
        rules.check_values(config)
        return config

    def resolved(self) -> Self:
        """Return the config with trainer.steps in place of trainer.tokens, and `root` in its one canonical form."""
        trainer, root = self.trainer, self.root.rstrip("/") or "/"
        if trainer.tokens is None:
            return self.derive(root=root)
        steps = -(-trainer.tokens // (trainer.batch * self.data.seq_len))
        return self.derive(root=root, trainer={"steps": steps, "tokens": None})

    def flat(self) -> dict[str, Any]:
        """Return all options under their full names, a component as its name: {"loss": "akl", "loss.mu": 0.3}."""
        return components.flat(self.to_dict())

    @property
    def traits(self) -> dict[str, Traits]:
        """Traits of all options by their full names."""
        return TRAITS

    @property
    def stored(self) -> TruncationConfig:
        """Part of the distribution in the store that this run writes or reads."""
        return self.record or self.truncation

    @property
    def tokenizer(self) -> str | None:
        """Name of the pretrained tokenizer: data.tokenizer, else that of a pretrained model; None to train one."""
        return self.data.tokenizer or self.student.name or self.teacher.name

    @property
    def is_evaluation(self) -> bool:
        """True if the student is measured as it is, without training."""
        return self.trainer.steps == 0

    @property
    def is_pretrained(self) -> bool:
        """True if the student's first weights are trained, so that its loss before training is informative."""
        return bool(self.student.name) or self.start.stage != "scratch"


def fine_tuning_rate(name: str | None) -> float:
    """Return the usual learning rate for trained weights: lower for those of a name than for those of a size."""
    return 1e-4 if name else 1e-3


TRAITS = all_traits(ExperimentConfig)
NO_EFFECT = tuple(name for name, traits in TRAITS.items() if not traits.effect)
NO_SIGNAL = tuple(name for name, traits in TRAITS.items() if traits.needs_signal)
RUN_OPTIONS = scalars(ExperimentConfig)  # options without a group
GROUPLESS = {"responses": scalars(ResponsesConfig)}  # options below a name that is no config group

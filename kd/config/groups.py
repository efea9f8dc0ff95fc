"""Configs of the groups: the chosen component of each, and the options of models, teacher, trainer and responses.

The options of a component are the parameters of its function. Options that other code reads are also declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from kd.config import components, declarations, plugins
from kd.config.declarations import Declaration
from kd.config.fields import MAX_SEED, ConfigNode, check_shape, converted, options, seed_setting, setting
from kd.config.sizes import SIZES
from kd.errors import UserError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class LogitsSource:
    """Source of the teacher's distributions. Its traits are what its function declares (kd.teachers.base.traits).

    A source without traits runs a finished teacher in the training step.
    """

    name: str
    traits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def distils(self) -> bool:
        """True if there is a signal from a teacher."""
        return "no_signal" not in self.traits

    @property
    def reads_store(self) -> bool:
        """True if distributions are read from a store."""
        return "reads_store" in self.traits

    @property
    def runs_teacher(self) -> bool:
        """True if a teacher computes in the training step."""
        return self.distils and not self.reads_store

    @property
    def trains_teacher(self) -> bool:
        """True if the teacher learns in the same step."""
        return "trains_teacher" in self.traits

    @property
    def is_recorded(self) -> bool:
        """True if the store is written while the teacher is trained."""
        return "recorded" in self.traits


@dataclass(frozen=True)
class Component(ConfigNode):
    """Option chosen in a config group: `loss=akl loss.mu=0.3` is Component("kd.objective.losses.akl", {"mu": 0.3}).

    The fields of a subclass repeat arguments of the function, so that code can read them without building it.
    """

    NO_OPTIONS: ClassVar = ("target", "args")

    target: str
    args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_node(cls, node: Any, path: str = "") -> Self:
        check_shape(node, path, component=True)
        args = {k: v for k, v in node.items() if k != "_target_"}
        return cls(target=node["_target_"], args=args, **converted(cls, args, path))

    @property
    def name(self) -> str:
        """Name of the option, such as akl."""
        return self.target.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        return {"_target_": self.target, **self.args}

    def derive(self, **changes: Any) -> Self:
        """Return a copy with other arguments."""
        return self.from_node(self.to_dict() | changes)

    def build(self, group: str) -> Callable:
        """Return the function with these arguments; raise UserError for a wrong target, name or type."""
        return components.build(self.to_dict(), group)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Component):
    """Source of the text, and options of packing."""

    seq_len: int = setting(default=256, least=1)  # tokens per row
    vocab: int = setting(default=1024)  # of the tokenizer trained on the text
    tokenizer: str | None = setting(default=None)
    tokens: int | None = setting(default=None)  # at most so many for training
    val_rows: int = setting(default=64)
    val_share: float = setting(default=0.05)  # of the documents
    special: str = setting(neutral="text")
    isolate: bool = setting(neutral=False)  # documents of a row do not see each other
    pack: bool = setting(neutral=False)  # several examples to a row

    @property
    def is_instructions(self) -> bool:
        """True if the text consists of prompts and responses."""
        return self.name == "instructions"

    @property
    def isolation(self) -> str | None:
        """Setting by which documents of a row do not see each other; None if they do."""
        return "data.pack" if self.pack else "data.isolate" if self.isolate else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers; the options of packing come first, as in config.yaml."""
        packing = {option.name: self.args[option.name] for option in options(DataConfig) if option.name in self.args}
        return packing | super().to_dict()


@dataclass(frozen=True, kw_only=True)
class TruncationConfig(Component):
    """Part of the teacher's distribution that is kept, in training or in a store."""

    biased: bool = setting(default=False, effect=False)  # does not change the draws
    path: str | None = setting(default=None, effect=False)  # of a store

    @property
    def spec(self) -> dict[str, Any]:
        """Name and settings, without `path` and `biased`."""
        return {"name": self.name} | {k: v for k, v in self.args.items() if k not in ("path", "biased")}

    @property
    def nested(self) -> dict[str, str]:
        """Settings with which a store of a plug-in's truncation serves less (kd.objective.truncation.nested)."""
        function = plugins.definition(self.target)
        declared = plugins.decorator(function, "nested") if function else None
        if function is None or declared is None:
            return {}
        positional, directions = declared
        settings = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)} - {"target"}
        if positional or not directions or not directions.keys() <= settings:
            wrong = next((name for name in directions if name not in settings), "")
            need = f"one of its settings, {', '.join(sorted(settings))}" if settings else "a function with settings"
            why, hint = f"names {wrong}, which is none of its settings" if wrong else "names no setting", "correct it"
            raise UserError(option=f"@nested of {self.target}", why=why, need=need, hint=hint)
        values = [value for value in directions.values() if value not in ("higher", "lower")]
        if values:
            need, hint = "higher or lower", 'write e.g. @nested(k="lower")'
            raise UserError(option=f"@nested of {self.target}", got=values[0], need=need, hint=hint)
        return directions

    def build(self, group: str) -> Callable:
        """Return the function; the place of a store is not one of its arguments."""
        node = self.to_dict()
        if group == "record":
            node.pop("path", None)
        return components.build(node, group)

    @property
    def is_full(self) -> bool:
        """True if all tokens are kept."""
        return self.name == "full"


@dataclass(frozen=True, kw_only=True)
class LogitsConfig(Component):
    """Source of the teacher's distributions."""

    path: str | None = setting(default=None, identity=False)  # of a store
    window: str | tuple | None = setting(default=None)  # share of a recorded teacher's training
    seed: int = setting(default=0, least=0, most=MAX_SEED)  # of the draws of a store of samples

    @property
    def source(self) -> LogitsSource:
        return LogitsSource(self.name, declarations.of_target(self.target, "traits").names)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Component):
    """Writer of the responses that the student learns from."""

    capacity: int = setting(default=1000, least=1)  # rows of rollout=adaptive

    @property
    def is_none(self) -> bool:
        """True if the responses are those of the data."""
        return self.name == "none"

    @property
    def declaration(self) -> Declaration:
        """Traits that its function declares (kd.rollout.base.traits)."""
        return declarations.of_target(self.target, "traits")

    @property
    def writes_all(self) -> bool:
        """True if the student learns from no response of the data."""
        return self.declaration.holds("writes_all", self.args) or self.by_teacher

    @property
    def by_teacher(self) -> bool:
        """True if the teacher writes all responses before training."""
        return self.declaration.holds("by_teacher", self.args)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Component):
    """Weights that learn in place of those of the student."""

    export: str = setting(neutral="merged")  # both: also the adapter alone

    @property
    def is_none(self) -> bool:
        """True if the weights of the student themselves learn."""
        return self.name == "none"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ConfigNode):
    """A size of kd/config/sizes.py, or a name on the Hub or folder."""

    size: str | None = setting(choices=tuple(SIZES))
    name: str | None


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(ConfigNode):
    """Teacher, and the training of one that is named by size."""

    steps: int = setting(least=1)
    batch: int = setting(least=1)
    lr: float = setting(least=0)
    seed: int = seed_setting()
    precision: Precision
    dtype: str | None = setting(neutral=None, choices=("fp32", "bf16", "int8", "nf4"))  # of a frozen teacher's weights
    sft: bool = setting(default=False)
    size: str | None = setting(choices=tuple(SIZES))
    name: str | None

    @property
    def exists(self) -> bool:
        """True if there is a teacher."""
        return bool(self.size or self.name)


@dataclass(frozen=True, kw_only=True)
class InitConfig(ConfigNode):
    """Origin of the student's first weights: none, for stage=scratch."""

    stage: Literal["scratch", "pretrained", "sft", "teacher"]

    @classmethod
    def from_node(cls, node: Any, path: str = "") -> Self:
        kinds = {"pretrained": PretrainedInit, "sft": FineTunedInit, "teacher": TeacherInit}
        stage = node.get("stage") if isinstance(node, Mapping) else None
        kind = kinds.get(stage, InitConfig) if isinstance(stage, str) else InitConfig
        check_shape(node, path)
        # `stage` chooses the class, whatever `cls` is.
        return super(InitConfig, kind).from_node(node, path)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class PretrainedInit(InitConfig):
    """Language modelling on plain text."""

    steps: int = setting(least=1)
    batch: int = setting(least=1)
    lr: float = setting(least=0)
    seed: int = seed_setting()


@dataclass(frozen=True, kw_only=True)
class FineTunedInit(PretrainedInit):
    """Language modelling on plain text, then fine-tuning on the instructions."""

    sft_steps: int = setting(least=1)
    sft_batch: int = setting(least=1)
    sft_lr: float | None = setting(least=0)


@dataclass(frozen=True, kw_only=True)
class TeacherInit(InitConfig):
    """Parts of the teacher that the student is made of, or has the shape of (kd/models/prune.py)."""

    layers: int | tuple | None = setting(least=1)
    keep: Literal["uniform", "every", "influence", "random"]
    ffn: int | None = setting(least=1)
    kv_heads: int | None = setting(least=1)
    hidden: int | None = setting(least=1)
    sample: int = setting(least=1)  # rows

    @property
    def ranks_layers(self) -> bool:
        """True if the layers are chosen by their influence."""
        return self.keep == "influence" and isinstance(self.layers, int)

    @property
    def measures(self) -> bool:
        """True if a part is chosen by the teacher's activations."""
        return self.ranks_layers or (self.keep != "random" and bool(self.ffn or self.kv_heads or self.hidden))


@dataclass(frozen=True, kw_only=True)
class ResponsesConfig(ConfigNode):
    """Responses of a trained student to the prompts of the validation rows."""

    samples: int = setting(least=1)
    temperature: float = setting(least=0)
    seed: int = seed_setting()


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(ConfigNode):
    """Length of training, batches, precision and devices."""

    INPUT_ONLY: ClassVar = ("tokens",)

    devices: int = setting(effect=False, least=1)  # of each machine
    nodes: int = setting(default=1, effect=False, least=1)  # machines
    strategy: Literal["auto", "ddp", "fsdp"] = setting(effect=False)
    shard_teacher: bool | None = setting(default=None, effect=False)
    steps: int = setting(least=0)  # 0: evaluation alone
    tokens: int | None = setting(default=None, least=1)  # resolved into steps
    batch: int = setting(least=1)  # rows per optimizer step
    micro_batch: int = setting(least=1)  # rows per forward pass
    clip: float = setting(least=0)  # norm of the gradients; 0 = unlimited
    precision: Precision
    attention: str | None = setting(neutral=None, choices=("eager", "sdpa", "flash_attention_2"))
    compile: bool | str = setting(choices=("auto",))
    gradient_checkpointing: bool = setting(default=False, effect=False)  # of models that learn
    chunk: int | None = setting(least=1)  # positions whose logits are in memory at a time
    log_every: int = setting(least=1)
    val_every: int = setting(least=1)
    checkpoint_every: int = setting(effect=False, least=1)
    keep: Literal["last", "best", "all"] = setting(neutral="last")
    patience: int | None = setting(neutral=None, least=1)
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = setting(effect=False)
    max_restarts: int = setting(default=0, effect=False, least=0)

    @property
    def ranks(self) -> int:
        """Number of processes, one per device of all machines."""
        return self.devices * self.nodes

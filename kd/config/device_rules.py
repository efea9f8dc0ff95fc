"""Rules for several devices: they can share the batch, the task and the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.groups import TrainerConfig
    from kd.config.schema import ExperimentConfig


def check_ranks(config: ExperimentConfig) -> None:
    """Refuse several devices for a batch or a task that they cannot share."""
    trainer, source = config.trainer, config.logits.source
    single = "trainer.devices=1" if trainer.nodes == 1 else "trainer.devices=1 trainer.nodes=1"
    if trainer.ranks > trainer.batch and not config.is_evaluation:
        fewer = f"trainer.devices={max(1, trainer.batch // trainer.nodes)}"
        raise UserError(
            option="trainer.devices",
            got=trainer.devices,
            conflict=f"trainer.batch={trainer.batch}",
            why="some devices would have no row of a batch",
            hint=f"type {fewer}, or trainer.batch={trainer.ranks}",
        )
    if trainer.ranks > 1 and not source.distils and config.record:
        raise UserError(
            option="trainer.devices",
            got=trainer.devices,
            conflict=f"record={config.record.name}",
            why="a teacher in training is recorded by one process",
            hint=f"type {single}, or leave record out",
        )
    if trainer.max_restarts and (trainer.ranks == 1 or trainer.nodes > 1):
        why, hint = "there are no other processes to start it again", "leave trainer.max_restarts out"
        if trainer.nodes > 1:
            why = "torchrun starts the processes of several machines"
            hint += f", and type torchrun --max-restarts={trainer.max_restarts}"
        conflict = "trainer.devices=1" if trainer.ranks == 1 else f"trainer.nodes={trainer.nodes}"
        option = "trainer.max_restarts"
        raise UserError(option=option, got=trainer.max_restarts, conflict=conflict, why=why, hint=hint)
    for option in ("trainer.strategy=fsdp", "trainer.shard_teacher=true"):
        name, value = option.removeprefix("trainer.").split("=")
        if str(getattr(trainer, name)).lower() != value:
            continue
        if trainer.ranks == 1:
            why, hint = "there is one process and nothing to share", "type trainer.devices=2"
            raise UserError(option=option, conflict="trainer.devices=1", why=why, hint=hint)
        check_shards(trainer, option)
    if trainer.shard_teacher and (source.reads_store or (source.trains_teacher and trainer.strategy != "fsdp")):
        why, hint = "as no teacher is loaded", "leave trainer.shard_teacher out"
        if not source.reads_store:
            why, hint = "as the teacher learns as the student does", f"{hint}, or type trainer.strategy=fsdp"
        raise UserError(
            option="trainer.shard_teacher",
            got=True,
            conflict=f"logits={source}",
            why=f"would do nothing, {why}",
            hint=hint,
        )


def check_shards(trainer: TrainerConfig, option: str) -> None:
    """Refuse shards that the ranks would not need at the same time."""
    if trainer.batch % trainer.ranks and trainer.steps:
        raise UserError(
            option=option,
            conflict=f"trainer.batch={trainer.batch}",
            need=f"as many rows for each of the {trainer.ranks} devices",
            hint=f"type trainer.batch={trainer.batch // trainer.ranks * trainer.ranks}",
        )
    if trainer.compile is True:
        why, hint = "models in shards cannot be compiled", "leave trainer.compile out"
        raise UserError(option=option, conflict="trainer.compile=true", why=why, hint=hint)


def check_optimizer(config: ExperimentConfig) -> None:
    """Refuse 8-bit moments of weights in shards: bitsandbytes knows no shards."""
    if config.optim.name == "adamw8" and config.trainer.strategy == "fsdp":
        hint = "type optim=adamw, whose moments are shared by the devices, or trainer=ddp"
        raise UserError(
            option="optim", got="adamw8", conflict="trainer.strategy=fsdp",
            why="moments of 8 bits are of whole weights", hint=hint,
        )  # fmt: skip


def check_attention(config: ExperimentConfig) -> None:
    """Refuse FlashAttention where it cannot compute."""
    trainer = config.trainer
    if trainer.attention != "flash_attention_2":
        return
    for option, value, need in (("accelerator", "cpu", "gpu"), ("precision", "fp32", "bf16")):
        if getattr(trainer, option) == value:
            raise UserError(
                option="trainer.attention",
                got=trainer.attention,
                conflict=f"trainer.{option}={value}",
                why="FlashAttention computes in bf16, on a GPU of NVIDIA",
                hint=f"type trainer.{option}={need}, or trainer.attention=sdpa",
            )

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
    if trainer.devices > trainer.batch and not config.is_evaluation:
        raise UserError(
            option="trainer.devices",
            got=trainer.devices,
            conflict=f"trainer.batch={trainer.batch}",
            why="some devices would have no row of a batch",
            hint=f"type trainer.devices={trainer.batch}, or trainer.batch={trainer.devices}",
        )
    if trainer.devices > 1 and not source.distils and config.record:
        raise UserError(
            option="trainer.devices",
            got=trainer.devices,
            conflict=f"record={config.record.name}",
            why="a teacher in training is recorded by one process",
            hint="type trainer.devices=1, or leave record out",
        )
    for option in ("trainer.strategy=fsdp", "trainer.shard_teacher=true"):
        name, value = option.removeprefix("trainer.").split("=")
        if str(getattr(trainer, name)).lower() != value:
            continue
        if trainer.devices == 1:
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
    if trainer.batch % trainer.devices and trainer.steps:
        raise UserError(
            option=option,
            conflict=f"trainer.batch={trainer.batch}",
            need=f"as many rows for each of the {trainer.devices} devices",
            hint=f"type trainer.batch={trainer.batch // trainer.devices * trainer.devices}",
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

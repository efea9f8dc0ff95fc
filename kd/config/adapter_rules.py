"""Rules for adapters: there are weights worth keeping under one, and the rest of the run can treat it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig


def check_adapter(config: ExperimentConfig) -> None:
    """Refuse an adapter for a random student, and beside settings that cannot treat it."""
    adapter, trainer = config.adapter, config.trainer
    if adapter.is_none:
        return
    refused = UserError(option="adapter", got=adapter.name)
    random = refused.replace(why="the weights under an adapter stay as they are, and these are random")
    if not config.is_pretrained:
        hint = "type student=hub student.name=…, or start=pretrained"
        raise random.replace(conflict=f"student.size={config.student.size}", hint=hint)
    if config.start.to_dict().get("keep") == "random":
        raise random.replace(conflict="start.keep=random", hint="leave start.keep out")
    if config.optim.name == "mup":
        raise refused.replace(
            conflict="optim=mup",
            why="its rates are for matrices of the model's width, and those of an adapter have the width of its rank",
            hint="type optim=adamw lr.peak=2e-4",
        )
    if trainer.strategy == "fsdp":
        raise refused.replace(
            conflict="trainer.strategy=fsdp",
            why="shards of an adapter are not supported",
            hint="type trainer.strategy=ddp: each device then holds the student, and gradients of the adapter alone",
        )
    if config.logits.source.trains_teacher:
        raise refused.replace(
            conflict=f"logits={config.logits.source}",
            why="that teacher learns all of its weights at the rate of the run, which is that of an adapter",
            hint="type logits=online",
        )
    if config.rollout.args.get("engine") == "vllm":
        raise refused.replace(
            conflict="rollout.engine=vllm",
            why="vLLM would get weights that are not merged",
            hint="type rollout.engine=kd",
        )
    if config.record and not config.logits.source.distils:
        raise refused.replace(
            conflict=f"record={config.record.name}",
            why="a teacher that is recorded in training learns all of its weights",
            hint="leave adapter or record out",
        )

"""Rules for rollouts: a model exists that can write the responses, and the student learns from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd.errors import UserError, check

if TYPE_CHECKING:
    from kd.config.schema import ExperimentConfig


def check_rollout(config: ExperimentConfig) -> None:
    """Refuse a rollout that no model of the run could write, or that the student would not learn from."""
    rollout, source = config.rollout, config.logits.source
    name = rollout.name
    if rollout.is_none:
        return
    if name == "adaptive":
        least, most = config.trainer.batch, rollout.capacity
        check("rollout.capacity", most, most >= least, f"at least a batch, {least} rows")

    if not config.data.is_instructions:
        why = "writes responses to prompts, and this data is plain text"
        raise UserError(option="rollout", got=name, why=why, hint="type data=instructions")
    if config.data.pack:
        why, hint = "writes the response of each row, and a row of packed data has several", "leave data.pack out"
        raise UserError(option="rollout", got=name, conflict="data.pack=true", why=why, hint=hint)
    if source.reads_store or source.trains_teacher:
        why = "a store has no logits of new text" if source.reads_store else "the teacher would write while it learns"
        hint = "type logits=online"
        raise UserError(option="rollout", got=name, conflict=f"logits={source}", why=why, hint=hint)
    if not source.distils and not rollout.by_teacher:
        why = "would do nothing, as the student learns from the data alone"
        raise UserError(option="rollout", got=name, conflict="logits=none", why=why, hint="type logits=online")
    if not config.teacher.exists:
        raise UserError(option="rollout", got=name, need="a teacher", hint="type teacher=1m")
    if config.routing.name == "entropy" and not rollout.by_teacher:
        raise UserError(
            option="rollout",
            got=name,
            conflict="routing=entropy",
            why="tokens that are not distilled are learned as text, and this text is the student's own",
            hint="leave routing out",
        )
    if rollout.args.get("engine") == "vllm" and config.trainer.ranks > 1:
        why, hint = "vllm writes in one process", "type trainer.devices=1, or rollout.engine=kd"
        trainer = config.trainer
        conflict = f"trainer.devices={trainer.devices}" if trainer.nodes == 1 else f"trainer.nodes={trainer.nodes}"
        raise UserError(option="rollout.engine", got="vllm", conflict=conflict, why=why, hint=hint)
    if config.record:
        why, hint = "a store is of the text of the data", "leave rollout or record out"
        raise UserError(option="rollout", got=name, conflict=f"record={config.record.name}", why=why, hint=hint)


def check_prompts_only(config: ExperimentConfig, learns_data: bool) -> None:
    """Refuse prompts without responses unless a rollout writes all. learns_data: true if alpha is ever below 1."""
    rollout = config.rollout
    missing = "this data has prompts and no responses"
    if not rollout.writes_all:
        needed = rollout.declaration.missing(rollout.args)  # settings with which this rollout would write all
        option, got = next(((f"rollout.{key}", rollout.args.get(key)) for key in needed), ("rollout", rollout.name))
        raise UserError(
            option=option,
            got=got,
            why=f"{missing}, and this rollout learns from the data",
            need="a rollout that writes all responses (one of your own declares it by @traits of kd.rollout.base)",
            hint="type rollout=student rollout.share=1 alpha.peak=1, or rollout=teacher. If the data has a column of "
            "responses, name the columns: data.prompt=COLUMN data.response=COLUMN",
        )
    if not rollout.by_teacher and learns_data and config.lm == "data":
        why = f"is below 1, so that responses would be learned as text, and {missing}"
        raise UserError(option="alpha", why=why, hint="type alpha.peak=1, or lm=plain")
    stage = config.start.stage == "sft"
    if stage or config.teacher.size or config.teacher.sft:
        what = "start=sft" if stage else f"teacher.size={config.teacher.size}"
        what = what if stage or config.teacher.size else "teacher.sft=true"
        raise UserError(
            option=what,
            why=f"needs responses to fine-tune on, and {missing}",
            hint="type teacher=hub teacher.name=NAME_OR_FOLDER, and start=scratch or start=pretrained",
        )

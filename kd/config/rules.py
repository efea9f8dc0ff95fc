"""Rules between options, checked before data and models are loaded. A refused config could not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kd.config import components as conf
from kd.config.adapter_rules import check_adapter
from kd.config.data_rules import check_isolation
from kd.config.device_rules import check_attention, check_optimizer, check_ranks
from kd.config.evaluation_rules import check_evaluation, unused_in_evaluation
from kd.config.rollout_rules import check_rollout
from kd.config.secrets import check_secrets
from kd.config.selection_rules import check_selection
from kd.config.start_rules import check_start, check_start_student, unused_in_start
from kd.config.teacher_rules import check_teacher, unused_setting
from kd.config.token_info import check_token_info
from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config.groups import Component
    from kd.config.schema import ExperimentConfig


def check_deletions(overrides: Iterable[str]) -> None:
    """Refuse an override that removes a setting."""
    for word in overrides:
        if word.startswith("~") and word.strip("~").partition("=")[0] not in (*conf.GROUPS, "responses"):
            raise UserError(option=word, why="every setting is needed", hint="type NAME=VALUE to change a setting")


def check_values(config: ExperimentConfig) -> None:
    """Refuse an empty root, a sweep name that is a path, a model named twice or not at all, and a wrong evaluation."""
    if not config.root:
        hint = "type root=runs, and unset KD_ROOT if it is empty"
        raise UserError(option="root", got="", need="a folder or a URL", hint=hint)
    conf.check_sweep(config.sweep)
    if config.responses.samples > 1 and config.responses.temperature == 0:
        raise UserError(
            option="responses.samples",
            got=config.responses.samples,
            conflict="responses.temperature=0",
            why="greedy responses to a prompt are all the same",
            hint="type responses.samples=1, or responses.temperature=1",
        )
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model.size and model.name:
            raise UserError(
                option=f"{role}.name",
                got=model.name,
                conflict=f"{role}.size={model.size}",
                why="a model has either a name or a size",
                hint=f"type {role}=hub first",
            )
    check_start_student(config)
    if not config.student.size and not config.student.name and config.start.stage != "teacher":
        raise UserError(
            option="student.size",
            got=None,
            need="a size, or the name of a model",
            hint="type e.g. student=200k, student=hub student.name=…, or start=teacher",
        )
    check_evaluation(config)


def check_steps(config: ExperimentConfig, overrides: Iterable[str]) -> None:
    """Refuse trainer.steps beside trainer.tokens."""
    trainer = config.trainer
    if trainer.tokens is not None and any(word.lstrip("+").startswith("trainer.steps=") for word in overrides):
        raise UserError(
            option="trainer.tokens",
            got=trainer.tokens,
            conflict=f"trainer.steps={trainer.steps}",
            why="each of them sets the length of the training",
            hint="leave trainer.tokens or trainer.steps out",
        )


def check_all(config: ExperimentConfig, overrides: Iterable[str]) -> None:
    """Check every rule; raise UserError for the first that the config or an override breaks."""
    check_secrets(f"{name}={value}" for name, value in config.flat().items())  # of the environment, too
    check_unused(config, overrides)
    for rule in RULES:
        rule(config)


def check_unused(config: ExperimentConfig, overrides: Iterable[str]) -> None:
    """Refuse an override without an effect in this config."""
    for word in overrides:
        if error := unused(config, word):
            raise error


def unused(config: ExperimentConfig, word: str) -> UserError | None:
    """Return the error for an override without an effect in this config; None if it has one."""
    if config.is_evaluation and (error := unused_in_evaluation(word, name_of(word))):
        return error
    source, group = config.logits.source, group_of(word)
    traits, name = config.traits.get(group), word.lstrip("+").partition("=")[0]
    refused = UserError(option=word, why="would do nothing")
    if not source.distils and traits and traits.needs_signal:
        why, hint = (
            "would do nothing, as the student learns from text alone",
            f"leave {name} out, or type logits=online",
        )
        return refused.replace(conflict=f"logits={source}", why=why, hint=hint)
    if source.runs_teacher and group == "record":
        why = "would do nothing, as this source of logits stores nothing"
        hint = (
            "leave record out, or type logits=offline to read a store, or logits=none to record a teacher in training"
        )
        return refused.replace(conflict=f"logits={source}", why=why, hint=hint)
    if not config.data.is_instructions and group in ("responses", "plain"):
        hint = f"type data=instructions, or leave {name} out"
        return refused.replace(why="would do nothing beside plain text", hint=hint)
    if config.student.name and word.startswith(("start.steps=", "start.batch=", "start.lr=")):
        hint = f"leave {name} out, or set the fine-tuning by start.sft_steps, start.sft_batch and start.sft_lr"
        why = "would do nothing, as it is for pretraining and this student is pretrained"
        return refused.replace(conflict=f"student.name={config.student.name}", why=why, hint=hint)
    if error := unused_in_start(config, word):
        return error
    if error := unused_setting(config, word, name):
        return error
    vocabulary = "the states of the chain" if config.data.name == "markov" else config.tokenizer
    if vocabulary and word.lstrip("+").startswith("data.vocab="):
        why = f"would do nothing, as no tokenizer is trained: this data has {vocabulary}"
        return refused.replace(why=why, hint="leave data.vocab out")
    return None


def check_scale(config: ExperimentConfig) -> None:
    """Refuse a scale for a single run: only sweeps have scales."""
    if config.scale != "cpu":
        hint = "type e.g. sweeps=scaling, or leave scale out"
        raise UserError(option="scale", got=config.scale, why="only a sweep has scales", hint=hint)


def check_upload(config: ExperimentConfig) -> None:
    """Refuse one repository for the students of a sweep."""
    if config.push_to_hub and config.sweep:
        hint = "choose a run of the sweep, and type its command with push_to_hub=NAME and without the sweep"
        why = "one repository holds one student"
        raise UserError(
            option="push_to_hub", got=config.push_to_hub, conflict=f"sweep={config.sweep}", why=why, hint=hint
        )


def check_logits(config: ExperimentConfig) -> None:
    """Refuse a source of logits that lacks something."""
    source, truncation, target = config.logits.source, config.truncation.name, config.target.name
    if source.is_recorded and (not config.teacher.size or config.stored.is_full):
        what = "truncation=full" if config.teacher.size else "teacher.size=null"
        raise UserError(
            option="logits",
            got="recorded",
            conflict=what,
            why="a teacher of a size is trained, and a part of its distribution is kept at each step",
            hint="type e.g. teacher=1m truncation=top_p_k",
        )
    if source.distils and truncation in ("full", "random") and target in ("rest", "leftover"):
        drops = "drops none" if truncation == "full" else "is a sample that adds up to 1"
        raise UserError(
            option="target",
            got=target,
            conflict=f"truncation={truncation}",
            why=f"the target decides where the probability goes that a truncation drops, and this truncation {drops}",
            hint="leave target out, or type truncation=top_k, top_p or top_p_k",
        )
    if source.trains_teacher and config.teacher.name and config.optim.name == "mup":
        raise UserError(
            option="optim",
            got="mup",
            conflict="logits=cotrained",
            why="the optimizer trains the pretrained teacher too, and mup is for sizes from scratch",
            hint="type optim=adamw lr.peak=1e-4",
        )
    if source.distils and not config.teacher.exists and not config.logits.path:
        also = ", or logits.path=… to read a store" if source.reads_store else ""
        hint = f"type teacher=1m, or logits=none to train without a teacher{also}"
        raise UserError(option="logits", got=str(source), need="a teacher", hint=hint)
    if not source.distils and config.record and config.record.is_full:
        raise UserError(
            option="record",
            got="full",
            why="a teacher in training has another output layer at each step, so that its whole distributions would "
            "take a number per token of the vocabulary",
            hint="type record=top_p_k, or record=random",
        )


def check_loss(config: ExperimentConfig) -> None:
    """Refuse a temperature or a return for which loss=minillm is not defined."""
    loss, temperature = config.loss.name, config.temperature
    if loss == "minillm" and not config.loss.args["single_step"] and config.rollout.args.get("exclude_own_reward"):
        raise UserError(
            option="loss.single_step",
            got=False,
            conflict="rollout.exclude_own_reward=true",
            why="the reward of a token itself would not count, as its return begins with the next token",
            hint="type rollout.exclude_own_reward=false",
        )
    unscaled = temperature.name == "fixed" and temperature.args["tau"] == temperature.args["student_tau"] == 1
    if loss == "minillm" and config.logits.source.distils and not unscaled:
        why, hint = "needs responses drawn at temperature 1", "leave temperature out"
        raise UserError(option="loss", got="minillm", conflict=f"temperature={temperature.name}", why=why, hint=hint)


# Options whose gradient is linear in the teacher's probabilities, with the settings that this requires.
LINEAR: dict[str, dict[str, dict[str, float]]] = {
    "loss": {"fkl": {}, "nll": {}, "jsd": {"beta": 0}, "akl": {"mu": 1}, "skl": {"alpha": 0},
             "distillm2": {"alpha": 0, "beta": 0}},
    "temperature": {"fixed": {"tau": 1}, "entropy": {"tau": 1, "theta": 0}, "wttm": {"tau": 1}},
    "target": {"renormalise": {}},
}  # fmt: skip


def not_linear(loss: Component, temperature: Component, target: Component) -> list[str]:
    """Return the overrides that make the gradient non-linear in the teacher's probabilities.

    If there are none, the gradient on a random sample of the teacher's tokens is unbiased. The mean of the samples is
    the teacher, so the mean of the gradients is that on the whole teacher.
    """
    if loss.name == "minillm" and not loss.args["single_step"]:
        return []  # does not read the distribution
    words = []
    for group, component in (("loss", loss), ("temperature", temperature), ("target", target)):
        linear, args = LINEAR[group].get(component.name), component.args
        others = [f"{group}.{k}={args[k]}" for k, value in (linear or {}).items() if args[k] != value]
        if others or linear is None:
            words += [f"{group}={component.name}", *others]
    return words


def check_sampling(config: ExperimentConfig) -> None:
    """Refuse a random sample of the teacher's tokens whose gradient is biased, unless that is accepted."""
    if not config.logits.source.distils or config.truncation.name != "random" or config.truncation.biased:
        return
    if words := not_linear(config.loss, config.temperature, config.target):
        raise UserError(
            option="truncation",
            got="random",
            conflict=" ".join(words),
            why="the gradient is biased: it is not linear in the teacher's probabilities, so that its mean over the "
            "draws is not that of the whole teacher",
            need="a loss with an unbiased gradient, as loss=fkl and loss=nll at temperature.tau=1 with "
            "target=renormalise",
            hint="type one of these, or truncation=top_p_k, or truncation.biased=true to train on the biased gradient",
        )


def check_lm(config: ExperimentConfig) -> None:
    """Refuse lm=plain for a run without plain text in addition to its data."""
    source = config.logits.source
    if config.lm == "plain" and (source.trains_teacher or not source.distils):
        why = "the teacher learns from one text" if source.distils else "nothing of the instructions would be learned"
        hint = "leave lm out, or type logits=online"
        raise UserError(option="lm", got="plain", conflict=f"logits={source}", why=why, hint=hint)
    if config.lm == "plain" and not config.data.is_instructions:
        why = "takes plain text beside instructions, and this data is plain text"
        raise UserError(option="lm", got="plain", why=why, hint="leave lm out, or type data=instructions")


def group_of(word: str) -> str:
    """Return the config group of an override: loss for loss=akl, ++loss.mu=1 and ~loss."""
    return name_of(word).partition(".")[0].partition("@")[0]


def name_of(word: str) -> str:
    """Return the name in an override: loss.mu for ++loss.mu=1."""
    return word.lstrip("+~").partition("=")[0]


Rule = Callable[["ExperimentConfig"], None]
RULES: tuple[Rule, ...] = (
    check_isolation,
    check_scale, check_logits, check_ranks, check_attention, check_optimizer, check_loss,
    check_token_info, check_sampling, check_lm, check_teacher, check_rollout, check_adapter, check_start,
    check_selection, check_upload,
)  # fmt: skip

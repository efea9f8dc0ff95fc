"""Rules between options, checked before data and models are there. What a rule refuses, no run can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kd.config import components as conf
from kd.config.secrets import check_secrets
from kd.errors import UserError, check

if TYPE_CHECKING:
    from kd.config.groups import Component, TrainerConfig
    from kd.config.schema import ExperimentConfig


def check_deletions(overrides: Iterable[str]) -> None:
    """Refuse an override that removes a setting."""
    for word in overrides:
        if word.startswith("~") and word.strip("~").partition("=")[0] not in (*conf.GROUPS, "responses"):
            raise UserError(f"{word}: every setting is needed; type NAME=VALUE to change it.")


def check_values(config: ExperimentConfig) -> None:
    """Refuse a name of a sweep that is a path, and models that are named twice or not at all."""
    conf.check_sweep(config.sweep)
    if config.responses.samples > 1 and config.responses.temperature == 0:
        raise UserError(
            f"responses.samples={config.responses.samples}: with responses.temperature=0 they are all the same; take "
            "one."
        )
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model.size and model.name:
            raise UserError(f"{role}.name={model.name}: {role}.size={model.size} is set too; type {role}=hub first.")
    if not config.student.size and not config.student.name:
        raise UserError(
            f"student.size={config.student.size}: need a size, e.g. student=200k, or student=hub student.name=…."
        )


def check_steps(config: ExperimentConfig, overrides: Iterable[str]) -> None:
    """Refuse trainer.steps beside trainer.tokens."""
    trainer = config.trainer
    if trainer.tokens is not None and any(word.lstrip("+").startswith("trainer.steps=") for word in overrides):
        raise UserError(f"trainer.tokens={trainer.tokens} and trainer.steps={trainer.steps}: one of them says it all.")


def check_all(config: ExperimentConfig, overrides: Iterable[str]) -> None:
    """Check every rule; raise UserError for the first that the config or an override breaks."""
    check_secrets(f"{name}={value}" for name, value in config.flat().items())  # of the environment, too
    check_unused(config, overrides)
    for rule in RULES:
        rule(config)


def check_unused(config: ExperimentConfig, overrides: Iterable[str]) -> None:
    """Refuse an override that would do nothing in this config."""
    for word in overrides:
        if reason := unused(config, word):
            raise UserError(reason)


def unused(config: ExperimentConfig, word: str) -> str | None:
    """Return why an override would do nothing in this config; None where it does something."""
    source, group = config.logits.source, group_of(word)
    traits = config.traits.get(group)
    if not source.distils and traits and traits.needs_signal:
        return f"logits={source} trains on text alone; {word} would do nothing: leave it out, or take logits=online."
    if source.runs_teacher and group == "record":
        return (
            f"logits={source} stores nothing; {word} would do nothing: leave it out, or take logits=offline to read "
            "what a store holds, or logits=none to record what a teacher says while it trains."
        )
    if not config.data.is_instructions and group in ("responses", "plain"):
        return f"{word} would do nothing beside plain text; type data=instructions, or leave it out."
    if config.student.name and word.startswith(("start.steps=", "start.batch=", "start.lr=")):
        return (
            f"{word} is of pretraining, and student.name={config.student.name} is pretrained; leave it out."
            " Of fine-tuning are start.sft_steps, start.sft_batch and start.sft_lr."
        )
    vocabulary = "the states of the chain" if config.data.name == "markov" else config.tokenizer
    if vocabulary and word.lstrip("+").startswith("data.vocab="):
        return f"data.vocab would do nothing: no tokenizer is trained, since there is {vocabulary}. Leave it out."
    return None


def check_scale(config: ExperimentConfig) -> None:
    """Refuse a scale, which runs of a sweep are not given."""
    if config.scale != "cpu":
        raise UserError(f"scale={config.scale}: only a sweep has scales; type sweeps=scaling, or leave it out.")


def check_logits(config: ExperimentConfig) -> None:
    """Refuse a source of logits that lacks something."""
    source, truncation, target = config.logits.source, config.truncation.name, config.target.name
    if source.is_recorded and (not config.teacher.size or config.stored.is_full):
        what = "truncation=full" if config.teacher.size else f"teacher.size={config.teacher.size}"
        raise UserError(
            f"logits=recorded, {what}: a teacher of a size is trained, and some of what it says at each step is kept: "
            "take teacher=1m, say, and truncation=top_p_k."
        )
    if source.distils and truncation in ("full", "random") and target in ("rest", "leftover"):
        raise UserError(
            f"target={target} says where the probability goes that a truncation drops, and truncation={truncation} "
            f"{'drops none' if truncation == 'full' else 'is a sample that adds up to 1'}: leave it out, or take "
            "truncation=top_k, top_p or top_p_k."
        )
    if source.trains_teacher and config.teacher.name and config.optim.name == "mup":
        raise UserError(
            "logits=cotrained has a pretrained teacher learn as the student does, and optim=mup is for sizes from "
            "scratch: type optim=adamw lr.peak=1e-4."
        )
    if source.distils and not config.teacher.exists and not config.logits.path:
        also = ", or logits.path=… to read a store, whoever wrote it" if source.reads_store else ""
        raise UserError(f"logits={source} needs a teacher: type teacher=1m, or logits=none to train without one{also}.")
    if not source.distils and config.record and config.record.is_full:
        raise UserError(
            "record=full: a teacher in training has another output layer at each step, so its whole distributions "
            "would take a number per token of the vocabulary. Take record=top_p_k, or record=random."
        )


def check_loss(config: ExperimentConfig) -> None:
    """Refuse a loss whose inputs nothing provides, and an option whose output no loss uses."""
    loss, temperature = config.loss.name, config.temperature
    if loss == "minillm" and not config.loss.args["single_step"] and config.rollout.args.get("from_next"):
        raise UserError(
            "loss.single_step=false: nothing would tell of a token itself, as its return begins with the next one; "
            "type rollout.from_next=false."
        )
    unscaled = temperature.name == "fixed" and temperature.args["tau"] == temperature.args["student_tau"] == 1
    if loss == "minillm" and config.logits.source.distils and not unscaled:
        raise UserError("loss=minillm compares what was drawn at temperature 1; leave temperature out.")
    if config.routing.name == "uncertainty" and loss != "atkd":
        raise UserError(f"routing=uncertainty tells loss=atkd which tokens are hard, and this is loss={loss}; type "
                        "loss=atkd, or routing=none.")  # fmt: skip


# Where the gradient is linear in the teacher's probabilities: options, with the settings that make them so.
LINEAR: dict[str, dict[str, dict[str, float]]] = {
    "loss": {"fkl": {}, "nll": {}, "jsd": {"beta": 0}, "akl": {"mu": 1}, "skl": {"alpha": 0},
             "distillm2": {"alpha": 0, "beta": 0}},
    "temperature": {"fixed": {"tau": 1}, "entropy": {"tau": 1, "theta": 0}, "wttm": {"tau": 1}},
    "target": {"renormalise": {}},
}  # fmt: skip


def not_linear(loss: Component, temperature: Component, target: Component) -> list[str]:
    """Return the words for what makes the gradient not linear in the teacher's probabilities.

    Without any, the gradient on a random sample of the teacher's tokens is unbiased: its mean is that on the whole
    teacher, since the mean of the samples is the teacher.
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
            f"truncation=random with {' '.join(words)}: the gradient is biased, as it is not linear in the "
            "teacher's probabilities, so its mean over the draws is not that of the whole teacher. Unbiased are "
            "loss=fkl and loss=nll at temperature.tau=1 with target=renormalise. Take one of these, or "
            "truncation=top_p_k, or type truncation.biased=true to train on the biased gradient."
        )


def check_lm(config: ExperimentConfig) -> None:
    """Refuse lm=plain without plain text beside what is distilled."""
    source = config.logits.source
    if config.lm == "plain" and (source.trains_teacher or not source.distils):
        why = "the teacher learns from one text" if source.distils else "nothing of the instructions would be learned"
        raise UserError(f"lm=plain with logits={source}: {why}; leave it out, or type logits=online.")
    if config.lm == "plain" and not config.data.is_instructions:
        raise UserError("lm=plain takes plain text beside instructions, and this data is plain text; leave it out.")


def check_teacher(config: ExperimentConfig) -> None:
    """Refuse to fine-tune a teacher that cannot be."""
    if not config.teacher.sft:
        return
    if not config.teacher.name:
        raise UserError(
            "teacher.sft=true needs a teacher by name: teacher=hub teacher.name=… (a size is always fine-tuned)."
        )
    if not config.data.is_instructions:
        raise UserError(
            "teacher.sft=true fine-tunes on instructions, and this data is plain text; type data=instructions."
        )
    if config.logits.source.trains_teacher:
        raise UserError("teacher.sft=true with logits=cotrained: that teacher learns on the way; leave it out.")


def check_rollout(config: ExperimentConfig) -> None:
    """Refuse a rollout that nobody could write, or that would not be learned."""
    rollout, source, loss = config.rollout, config.logits.source, config.loss.name
    name = rollout.name
    if rollout.is_none:
        return
    if name == "mixed" and loss != "minillm":
        raise UserError(
            f"rollout=mixed says what its text is worth to loss=minillm, and this is loss={loss}; type loss=minillm, "
            "or rollout=student."
        )
    if name == "adaptive":
        least, most = config.trainer.batch, rollout.capacity
        check("rollout.capacity", most, most >= least, f"at least a batch, {least} rows")
    option = f"rollout={name}"
    if not config.data.is_instructions:
        raise UserError(f"{option} writes responses to prompts, and this data is plain text; type data=instructions.")
    if source.reads_store or source.trains_teacher:
        why = "a store knows nothing of new text" if source.reads_store else "the teacher would write while it learns"
        raise UserError(f"{option} with logits={source}: {why}; type logits=online.")
    if not source.distils and not rollout.by_teacher:
        raise UserError(f"{option} would do nothing, as logits=none learns from the data alone; type logits=online.")
    if not config.teacher.exists:
        raise UserError(f"{option} needs a teacher; type teacher=1m.")
    if config.routing.name == "entropy" and not rollout.by_teacher:
        raise UserError(
            f"{option} with routing=entropy: tokens that are not distilled are learned as text, and this text is the "
            "student's own. Leave routing out."
        )
    if rollout.args.get("engine") == "vllm" and config.trainer.devices > 1:
        raise UserError("rollout.engine=vllm writes in one process; type trainer.devices=1, or rollout.engine=kd.")
    if config.record:
        raise UserError(f"{option} and record: a store is of the text of the data. Leave one of them out.")


def check_prompts_only(config: ExperimentConfig, learns_data: bool) -> None:
    """Refuse prompts without responses unless a rollout writes them all. learns_data: whether alpha is ever below 1."""
    name, rollout = config.rollout.name, config.rollout
    missing = "This data has prompts and no responses"
    if name not in ("teacher", "pairs", "mixed") and not (name == "student" and rollout.args["share"] == 1):
        got = f"rollout={name}" + (f" rollout.share={rollout.args['share']}" if name == "student" else "")
        raise UserError(
            f"{missing}, and {got} learns from the data: need a rollout that writes them all. Type rollout=student "
            "rollout.share=1 alpha.peak=1, or rollout=teacher. If there is a column of responses, name it: "
            "data.prompt=COLUMN data.response=COLUMN."
        )
    if name != "teacher" and learns_data and config.lm == "data":
        raise UserError(
            f"{missing}, and alpha is below 1, so some would be learned as text: type alpha.peak=1, or lm=plain."
        )
    stage = config.start.stage == "sft"
    if stage or config.teacher.size or config.teacher.sft:
        what = "start=sft" if stage else f"teacher.size={config.teacher.size}"
        what = what if stage or config.teacher.size else "teacher.sft=true"
        raise UserError(
            f"{missing}, and {what} is fine-tuned on responses. Type teacher=hub teacher.name=NAME_OR_FOLDER, and "
            "start=scratch or start=pretrained."
        )


def check_ranks(config: ExperimentConfig) -> None:
    """Refuse several devices for a batch or a task that they cannot share."""
    trainer, source = config.trainer, config.logits.source
    if trainer.devices > trainer.batch:
        raise UserError(
            f"trainer.devices={trainer.devices}: a batch of {trainer.batch} rows leaves some without a row; type "
            f"trainer.devices={trainer.batch}, or trainer.batch={trainer.devices}."
        )
    if trainer.devices > 1 and not source.distils and config.record:
        raise UserError(
            f"trainer.devices={trainer.devices}: one process records what a teacher says while it trains; type "
            "trainer.devices=1, or leave record out."
        )
    for option in ("trainer.strategy=fsdp", "trainer.shard_teacher=true"):
        name, value = option.removeprefix("trainer.").split("=")
        if str(getattr(trainer, name)).lower() != value:
            continue
        if trainer.devices == 1:
            raise UserError(f"{option}: there is one process and nothing to share; type trainer.devices=2.")
        check_shards(trainer, option)
    if trainer.shard_teacher and (source.reads_store or (source.trains_teacher and trainer.strategy != "fsdp")):
        learns = "it learns as the student does; type trainer.strategy=fsdp"
        why = "no teacher is loaded" if source.reads_store else learns
        raise UserError(f"trainer.shard_teacher=true would do nothing with logits={source}: {why}. Leave it out.")


def check_shards(trainer: TrainerConfig, option: str) -> None:
    """Refuse shards that the ranks would not need at the same time."""
    if trainer.batch % trainer.devices:
        raise UserError(
            f"{option}: each device needs as many rows as any other, and a batch has {trainer.batch}; type "
            f"trainer.batch={trainer.batch // trainer.devices * trainer.devices}."
        )
    if trainer.compile:
        raise UserError(f"{option}: trainer.compile=true is not made for models in shards; leave it out.")


def group_of(word: str) -> str:
    """Return the config group that an override is about: loss for loss=akl, ++loss.mu=1 and ~loss."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


Rule = Callable[["ExperimentConfig"], None]
RULES: tuple[Rule, ...] = (
    check_scale, check_logits, check_ranks, check_loss, check_sampling, check_lm, check_teacher, check_rollout
)  # fmt: skip

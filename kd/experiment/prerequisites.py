"""Prerequisites of a run: data, teacher, initial weights, text that the teacher writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kd.config import plugins
from kd.config.rollout_rules import check_prompts_only
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.data.batches import Packed
from kd.data.tokenizer import load_tokenizer, vocabulary_size
from kd.errors import UserError
from kd.experiment.components import Components, build_functions, over_run
from kd.experiment.dependencies import Plan, corpus, plain_corpus, teacher_computation
from kd.runs import provenance, wandb_agent
from kd.runs.run import Run, check_student
from kd.runs.seal import SEALED
from kd.system import files
from kd.system.console import console, silence_libraries
from kd.system.remote import create_root, local_root
from kd.system.signals import requests

if TYPE_CHECKING:
    from kd.models.causal_lm import CausalLM
    from kd.store.reader import Store


class Inputs(NamedTuple):
    """Inputs of a run."""

    packed: Packed
    components: Components
    teacher: str | None  # folder, or name on the Hub
    start: str | None  # folder of the weights that the student starts from
    store: Store | None
    plain: Packed | None  # text of the language-modelling term, where that is not the data's
    origins: dict[str, dict]  # role -> provenance.origin() of its run

    def student(self, config: ExperimentConfig) -> CausalLM:
        """Return the student as it starts, with its adapter."""
        from kd.models import causal_lm

        size, name = (None, self.start) if self.start else (config.student.size, config.student.name)
        vocab = vocabulary_size(self.components.tokenizer)
        student = causal_lm.build_model(size, name, vocab=vocab, seq_len=config.data.seq_len, option="student.name")
        if config.trainer.attention:
            student.set_attention(config.trainer.attention)
        self.components.adapter(student)
        return student

    def first_weights(self, config: ExperimentConfig) -> str | None:
        """Return the full name of the model that the student starts from; None for random weights."""
        return full_name(self.start or config.student.name)


def full_name(name: str | None) -> str | None:
    """Return the absolute path of a model's folder, or its name on the Hub."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


class FinishedRun(NamedTuple):
    """Run and its result. before: true if it was done already, so that this command trained nothing."""

    run: Run
    result: dict
    before: bool

    def check_files(self) -> None:
        """Check the files of a run that was done before; of one under a URL all but the student. Raises UserError."""
        if self.before:
            run = self.run
            names: Sequence[str] = SEALED
            if run.remote:
                names = [name for name in self.result.get("files", {}) if name in SEALED]
                for name in names:
                    run.copy(name)
            if names:
                run.check(self.result, *names)


Train = Callable[[ExperimentConfig], FinishedRun]  # trains a run, unless it is done


def ensure(config: ExperimentConfig, train: Train) -> Inputs:
    """Check the prerequisites of a run, and make missing ones: data, teacher, first weights, store, teacher's text."""
    planned = Plan.from_config(config)
    packed, components = prepare(config)
    check_pruning(config, components)
    for model in (config.student.name, config.teacher.name, config.data.tokenizer):
        check_student(model)
    name, store = config.teacher.name, None
    if config.logits.source.reads_store:
        from kd.experiment import stores

        if planned.recording and not planned.store_place.manifest().exists():
            with wandb_agent.hidden():
                train(planned.recording)
        name = None
        store = stores.open_or_write(
            config, packed, components.truncate, lambda: teacher_model(config, packed, components, train)
        )
        requests.end_if_asked()
    elif planned.teacher:
        name = ensure_trained(planned.teacher, train)
    check_tokenizers(config, components.tokenizer, name)
    start_path = ensure_trained(planned.start, train) if planned.start else None
    if planned.pruned:
        from kd.experiment import starts

        # The student is cut from weights that nothing has rounded.
        whole = config.derive(teacher={"dtype": None}, trainer={"attention": None})
        start_path = starts.ensure_start(
            config, packed, planned.pruned, lambda: teacher_model(whole, packed, components, train)
        )
        requests.end_if_asked()
    packed = written_by_teacher(config, packed, components, train)
    before = origins({"teacher": planned.teacher, "start": planned.start})
    return Inputs(packed, components, name, start_path, store, plain_text(config), before)


def check_recorded(config: ExperimentConfig) -> None:
    """Raise UserError for a run that finished without the recording that the config now requests."""
    planned = Plan.from_config(config)
    run, store = planned.run, planned.store
    if store and not store.manifest().exists() and not config.logits.source.distils:
        raise UserError(
            option=run.name,
            why="is done, and nothing was recorded",
            hint="to train the run once more and record it, type this, and then the same command again",
            commands=[run.removal_command()],
        )


def check_logger(config: ExperimentConfig) -> None:
    """Raise UserError for a logger that would not start."""
    from kd.runs import loggers

    silence_libraries()
    loggers.check(config.logger.name)


def ensure_trained(config: ExperimentConfig, train: Train) -> str:
    """Return the folder of the model that a run makes; train it first if there is none."""
    with wandb_agent.hidden():  # the agent requested another run, which needs this one
        run, result, before = train(config)
    run.check(result, "student")
    if before and (reasons := provenance.reasons(result)):
        console.print(
            f"{run.name}, which this run needs, may not be what this code would make: {'; '.join(reasons)}. To make "
            f"it anew, type:\n  {run.removal_command()}\nand the same command again, with force=true.", soft_wrap=True,
        )  # fmt: skip
    requests.end_if_asked()
    return str(run / "student")


def origins(models: dict[str, ExperimentConfig | None]) -> dict[str, dict]:
    """Return the record of earlier runs in a result; none for a store whose teacher is elsewhere or damaged."""
    records = {}
    for role, config in models.items():
        with suppress(UserError):
            if config and (result := Plan.from_config(config).run.result()):
                records[role] = provenance.origin(result)
    return records


def prepare(config: ExperimentConfig) -> tuple[Packed, Components]:
    """Return the packed data and the tried components of a run. All errors apart from those of models occur here."""
    functions = build_functions(config)  # mistakes are reported before the text is read, which may take minutes
    source, packing_options = corpus(config)
    anew = config.force and not config.plan
    packed = packing.pack(source, create_root(config.root) / "data", **packing_options, anew=anew)
    components = Components(config, packed, functions)
    if packed.prompts_only and not config.is_evaluation:
        check_prompts_only(config, min(over_run(components.alpha)) < 1)
    if config.logits.source.reads_store:
        from kd.experiment import stores

        stores.opened(config, packed)
    return packed, components


def check_pruning(config: ExperimentConfig, components: Components) -> None:
    """Raise UserError for a student that cannot be made of its teacher, before the teacher is trained."""
    if Plan.from_config(config).pruned:
        from kd.experiment import starts

        silence_libraries()
        starts.student_shape(config, vocabulary_size(components.tokenizer))


def plain_text(config: ExperimentConfig) -> Packed | None:
    """Return the packed text of the language-modelling term; None if it is the data's own."""
    if config.lm != "plain":
        return None
    source, packing_options = plain_corpus(config)
    return packing.pack(source, local_root(config.root) / "data", **packing_options)


def teacher_model(config: ExperimentConfig, packed: Packed, components: Components, train: Train) -> CausalLM:
    """Return the finished teacher; train it first if there is none."""
    from kd.experiment import teacher_weights

    silence_libraries()
    planned = Plan.from_config(config)
    trained = planned.recording or planned.teacher
    name = ensure_trained(trained, train) if trained else config.teacher.name
    if name is None:
        raise UserError(
            option=planned.store_place.path,
            why="does not exist, and teacher=none cannot write a store",
            hint="give the path of a store as logits.path, or choose a teacher, e.g. teacher=1m",
        )
    check_student(config.teacher.name)
    check_tokenizers(config, components.tokenizer, name)
    return teacher_weights.load(config, packed, vocabulary_size(components.tokenizer), name)


def written_by_teacher(config: ExperimentConfig, packed: Packed, components: Components, train: Train) -> Packed:
    """Return the data with text of the teacher, written once.

    It is all responses if the rollout declares by_teacher, else the references that are missing.
    """
    from kd.parallel import collectives
    from kd.rollout import strategies, teacher_text
    from kd.rollout.samplers import Samplers

    writes = config.rollout.by_teacher
    sides = (*(["train"] if writes else []), *(["val"] if packed.prompts_only else []))
    if not sides:
        return packed
    teacher = Plan.from_config(config).teacher
    teacher_id = (
        teacher and Plan.from_config(teacher).run.name,
        files.folder_fingerprint(config.teacher.name),
        {k: v for k, v in config.teacher.to_dict().items() if k != "dtype"} | teacher_computation(config),
    )
    # As a rollout used to be written in configs, so that folders keep their names.
    target = f"kd.rollout.{config.rollout.name}"
    rollout = {"_target_": target, "_partial_": True, **config.rollout.args} if writes else None
    key = [packed.folder.name, rollout, teacher_id, *([sides] if packed.prompts_only else [])]
    if writes and (code := plugins.digests([config.rollout.target])):
        key.append(code)
    folder = local_root(config.root) / "rollouts" / files.digest_of(key)[:16]

    def samplers() -> Samplers:
        model = teacher_model(config, packed, components, train).to(collectives.device(config.trainer.accelerator))
        return Samplers(None, model, packed.eos_token_id, config.teacher.seed)

    return teacher_text.by_teacher(
        packed, folder, components.rollout if writes else strategies.teacher, samplers, sides
    )


def check_tokenizers(config: ExperimentConfig, ours, teacher_name: str | None) -> None:
    """Raise UserError unless pretrained models use the tokenizer of the data."""
    from kd.models import causal_lm

    for option, name in (("student.name", config.student.name), ("teacher.name", teacher_name)):
        if name:
            theirs = load_tokenizer(name, f"The tokenizer of {option}={name}")
            causal_lm.check_same_vocabulary(ours, theirs, f"{option}={name}", config.token_names == "any")
            causal_lm.check_rows(theirs, name, option)

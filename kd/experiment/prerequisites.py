"""What a run needs before it begins: data, teacher, initial weights, text that the teacher writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from kd.config.rules import (
    Settings,
    check_prompts_only,
    name_of,
    source_of,
)
from kd.data import packing
from kd.data.batches import Packed
from kd.data.tokenizer import load_tokenizer, vocabulary_size
from kd.errors import UserError
from kd.experiment.dependencies import corpus, plain_corpus, plan, recording
from kd.runs import provenance, wandb_agent
from kd.runs.run import SEALED, Run, check_student
from kd.system import files
from kd.system.console import console, silence_libraries
from kd.system.remote import home
from kd.system.signals import requests

if TYPE_CHECKING:
    from kd.models.causal_lm import CausalLM
    from kd.store.reader import Store


from kd.experiment.components import Components


class Inputs(NamedTuple):
    """What a run is given when it begins."""

    packed: Packed
    components: Components
    teacher: str | None  # folder, or name on the Hub
    start: str | None  # folder of the weights that the student starts from
    store: Store | None
    plain: Packed | None  # text of the language-modelling term, where that is not the data's
    origins: dict[str, dict]  # role -> provenance.origin() of its run

    def student(self, settings: Settings) -> CausalLM:
        """Return the student as it starts."""
        from kd.models import causal_lm

        which = {"size": None, "name": self.start} if self.start else settings["student"]
        vocab = vocabulary_size(self.components.tokenizer)
        return causal_lm.build(**which, vocab=vocab, seq_len=settings["data"]["seq_len"], option="student.name")


class Outcome(NamedTuple):
    """A run and its result; before: whether it was done already, so that this command trained nothing."""

    run: Run
    result: dict
    before: bool

    def check_files(self) -> None:
        """Check the files of a run that was done before; of one under a URL all but the student. Raises UserError."""
        if self.before:
            run, names = self.run, SEALED
            if run.remote:
                names = [name for name in self.result.get("files", {}) if name in SEALED]
                for name in names:
                    run.copy(name)
            if names:
                run.check(self.result, *names)


Train = Callable[[Settings], Outcome]  # trains what the settings say, unless it is done


def ensure(settings: Settings, train: Train) -> Inputs:
    """Check what a run needs, and make what is missing: data, teacher, initial weights, store, text by the teacher."""
    _, teacher, start, where = plan(settings)
    if settings["trainer"]["devices"] > 1:
        from kd.parallel import collectives

        collectives.check_devices(settings["trainer"])
    packed, components = prepare(settings)
    for model in (settings["student"]["name"], settings["teacher"]["name"], settings["data"]["tokenizer"]):
        check_student(model)
    name, store = settings["teacher"]["name"], None
    if source_of(settings) == "offline":
        from kd.experiment import stores

        if (record := recording(settings)) and not where.manifest().exists():
            with wandb_agent.hidden():
                train(record)
        name = None
        store = stores.stored(settings, packed, components.keep, lambda: teacher_model(settings, components, train))
        requests.end_if_asked()
    elif teacher:
        name = ensure_trained(teacher, train)
    check_tokenizers(settings, components.tokenizer, name)
    packed = written_by_teacher(settings, packed, components, train)
    start_path = ensure_trained(start, train) if start else None
    before = origins({"teacher": teacher, "start": start})
    return Inputs(packed, components, name, start_path, store, plain_text(settings), before)


def check_recorded(settings: Settings) -> None:
    """Raise UserError for a run that is done without the recording that is asked for now."""
    run, _, _, where = plan(settings)
    if where and not where.manifest().exists() and source_of(settings) == "none":
        raise UserError(
            f"{run.name} is done, and nothing was recorded. To train it once more and record it, type:\n"
            f"  {run.removal()}\nand the same command again."
        )


def check_logger(settings: Settings) -> None:
    """Raise UserError for a logger that would not start."""
    from kd.runs import loggers

    silence_libraries()
    loggers.check(name_of(settings["logger"]))


def ensure_trained(model: Settings, train: Train) -> str:
    """Return the folder of the model that these settings make, trained first if there is none."""
    with wandb_agent.hidden():  # which asked for the run that needs it
        made, result, before = train(model)
    made.check(result, "student")
    if before and (reasons := provenance.reasons(result)):
        console.print(
            f"{made.name}, which this run needs, may not be what this code would make: {'; '.join(reasons)}. To make "
            f"it anew, type:\n  {made.removal()}\nand the same command again, with force=true.", soft_wrap=True,
        )  # fmt: skip
    requests.end_if_asked()
    return str(made / "student")


def origins(models: dict[str, Settings | None]) -> dict[str, dict]:
    """Return what a result keeps of the runs behind it; nothing of a store whose teacher is elsewhere or damaged."""
    found = {}
    for role, settings in models.items():
        with suppress(UserError):
            if settings and (result := plan(settings).run.result()):
                found[role] = provenance.origin(result)
    return found


def prepare(settings: Settings) -> tuple[Packed, Components]:
    """The data, packed, and the parts of the run, tried; all that can be wrong short of the models is found here."""
    source, how = corpus(settings)
    anew = settings["force"] and not settings["plan"]
    packed = packing.pack(source, home(settings["root"]) / "data", **how, anew=anew)
    parts = Components(settings, packed)
    if packed.prompts_only:
        check_prompts_only(settings, any(parts.alpha(step / 100) < 1 for step in range(101)))
    if source_of(settings) == "offline":
        from kd.experiment import stores

        stores.opened(settings, packed)
    return packed, parts


def plain_text(settings: Settings) -> Packed | None:
    """The text of the language-modelling term, packed; None where it is the data's own."""
    if settings["lm"] != "plain":
        return None
    source, how = plain_corpus(settings)
    return packing.pack(source, home(settings["root"]) / "data", **how)


def teacher_model(settings: Settings, components: Components, train: Train) -> CausalLM:
    """The finished teacher, made first if there is none."""
    from kd.models import causal_lm

    silence_libraries()
    _, teacher, _, where = plan(settings)
    name = ensure_trained(teacher, train) if teacher else settings["teacher"]["name"]
    if name is None:
        raise UserError(f"There is no store at {where.path}, and teacher=none cannot write one.")
    check_student(settings["teacher"]["name"])
    check_tokenizers(settings, components.tokenizer, name)
    vocab = vocabulary_size(components.tokenizer)
    return causal_lm.build(None, name, vocab, settings["data"]["seq_len"], "teacher.name")


def written_by_teacher(settings: Settings, packed: Packed, components: Components, train: Train) -> Packed:
    """The data with what the teacher writes, once: all responses for rollout=teacher, references that are missing."""
    from kd.parallel import collectives
    from kd.rollout import strategies, teacher_text

    writes = name_of(settings["rollout"]) == "teacher"
    sides = (*(["train"] if writes else []), *(["val"] if packed.prompts_only else []))
    if not sides:
        return packed
    of = plan(settings)
    who = of.teacher and plan(of.teacher).run.name, files.stamp(settings["teacher"]["name"]), settings["teacher"]
    # As the settings of a rollout used to be written, so that folders keep their names.
    how = settings["rollout"] | {"_target_": "kd.rollout.teacher", "_partial_": True} if writes else None
    made = [packed.folder.name, how, who, *([sides] if packed.prompts_only else [])]
    folder = home(settings["root"]) / "rollouts" / files.digest_of(made)[:16]

    def writers() -> strategies.Writers:
        model = teacher_model(settings, components, train).to(collectives.device(settings["trainer"]["accelerator"]))
        return strategies.Writers(None, model, packed.end, settings["teacher"]["seed"])

    return teacher_text.by_teacher(packed, folder, components.rollout if writes else strategies.teacher, writers, sides)


def check_tokenizers(settings: Settings, ours, teacher_name: str | None) -> None:
    """Raise UserError unless pretrained models use the tokenizer of the data."""
    from kd.models import causal_lm

    for option, name in (("student.name", settings["student"]["name"]), ("teacher.name", teacher_name)):
        if name:
            theirs = load_tokenizer(name, f"The tokenizer of {option}={name}")
            causal_lm.same_vocabulary(ours, theirs, f"{option}={name}", settings["token_names"] == "any")
            causal_lm.check_rows(theirs, name, option)

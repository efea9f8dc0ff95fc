"""Plan of a run: its folder, its data, its store, and the runs that make its teacher and its first weights.

Needs no model and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from kd.config import argument_types, plugins
from kd.config import components as conf
from kd.config.compose import default_config
from kd.config.groups import (
    Component,
    DataConfig,
    FineTunedInit,
    ModelConfig,
    PretrainedInit,
    TeacherConfig,
    TeacherInit,
)
from kd.config.schema import ExperimentConfig, fine_tuning_rate
from kd.data import packing
from kd.data.corpora import Corpus
from kd.errors import UserError
from kd.runs import provenance
from kd.runs.identity import identity, identity_settings, whole_as_float
from kd.runs.run import Run
from kd.store.location import FORMAT, Place
from kd.system import files, remote
from kd.system.files import read_json

STARTS = 1  # format of folders in starts/
_plans: WeakKeyDictionary[ExperimentConfig, Plan] = WeakKeyDictionary()


class Plan(NamedTuple):
    """Folders and further runs that a config stands for."""

    run: Run
    teacher: ExperimentConfig | None  # run that makes the teacher; None if it is not to be made
    start: ExperimentConfig | None  # run that makes the student's first weights
    store: Place | None  # of the teacher's logits, to be read or written
    recording: ExperimentConfig | None  # run that records the store, for logits=recorded
    pruned: Path | None  # folder of the student's first weights, if it is made of its teacher

    @property
    def store_place(self) -> Place:
        """Place of the store, for a config that reads or writes one."""
        assert self.store is not None, "this run neither reads nor writes a store"
        return self.store

    @classmethod
    def from_config(cls, config: ExperimentConfig) -> Plan:
        """Return the plan of a config, made once. Data, teacher and store are part of a run's identity."""
        if config not in _plans:
            _plans[config] = _build_plan(config)
        return _plans[config]


def _build_plan(config: ExperimentConfig) -> Plan:
    source, packing_options = corpus(config)
    digests: dict[str, Any] = {"data": packing.key(source, **packing_options)}
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if stamp := files.folder_fingerprint(model.name):
            digests[f"{role}.name"] = stamp
    if plugged := plugins.digests(plugged_in(config)):
        digests["plugins"] = plugged
    teacher = store = recording = None
    if (config.teacher.size or config.teacher.sft) and not config.logits.source.trains_teacher:
        teacher = teacher_config(config)
        digests["teacher"] = Plan.from_config(teacher).run.name
    if start := start_config(config):
        digests["start"] = Plan.from_config(start).run.name
    if pruned := pruned_start(config, digests):
        digests["start"] = pruned.name
    if config.lm == "plain":
        text, packing_options = plain_corpus(config)
        digests["plain"] = packing.key(text, **packing_options)
    if config.logits.source.reads_store:
        recording = recording_config(config) if config.logits.source.is_recorded else None
        recorded = Plan.from_config(recording).store if recording else None
        store = recorded or place(config, _store_key(config, digests), config.logits.path)
        digests["store"] = store.key
    run = Run(config.root, identity(config.flat(), **digests))
    if config.record and not config.logits.source.distils:
        store = place(config, files.digest_of([run.name, config.record.spec])[:16], config.record.path)
    return Plan(run, teacher, start, store, recording, pruned)


def plugged_in(config: ExperimentConfig) -> list[str]:
    """Return the functions of plug-ins that affect the result of a run, as the config names them."""
    if not plugins.allowed():
        return []
    part = identity_settings(config.flat())
    groups = [group for group in conf.MODULES if group in part]
    nodes = [getattr(config, group) for group in (*groups, *(("plain",) if config.data.is_instructions else ()))]
    targets = [node.target for node in nodes if isinstance(node, Component)]
    return [target for target in targets if plugins.plugin_of(target)]


def _store_key(config: ExperimentConfig, digests: dict[str, Any]) -> str:
    """Return the name of a store's folder: a digest of all settings that its content depends on."""
    spec = config.stored.spec
    inputs = {k: v for k, v in digests.items() if k in ("data", "teacher", "teacher.name")}
    if plugged := plugins.digests([config.stored.target]):
        inputs["plugins"] = plugged
    inputs |= teacher_computation(config)
    seed = config.logits.seed if spec["name"] == "random" else None
    on_hub = None if "teacher.name" in digests else config.teacher.name
    return files.digest_of([FORMAT, inputs, config.trainer.precision, whole_as_float(spec), seed, on_hub])[:16]


def pruned_start(config: ExperimentConfig, digests: dict[str, Any]) -> Path | None:
    """Return the folder of first weights that are made of the teacher, see starts.py; None for another start."""
    start = config.start
    if not isinstance(start, TeacherInit):
        return None
    inputs = {k: v for k, v in digests.items() if k in ("teacher", "teacher.name") or (k == "data" and start.measures)}
    on_hub = None if "teacher.name" in digests else config.teacher.name
    settings = {k: v for k, v in start.to_dict().items() if k != "sample" or start.measures}
    seed = config.seed if start.keep == "random" else None
    key = files.digest_of([STARTS, inputs, on_hub, settings, seed])[:16]
    return remote.local_root(config.root) / "starts" / key


def teacher_computation(config: ExperimentConfig) -> dict[str, str]:
    """Return the settings beside trainer.precision that change what a finished teacher computes; {} by default."""
    settings = {"teacher.dtype": config.teacher.dtype, "trainer.attention": config.trainer.attention}
    return {name: value for name, value in settings.items() if value is not None}


def place(config: ExperimentConfig, key: str, path: str | None) -> Place:
    """Return the place of a store. An existing store keeps the key that it was written under."""
    folder = remote.local_root(config.root) / "stores"
    usual = f"{config.root}/stores/{key}" if remote.is_url(config.root) else str(folder / key)
    store_place = Place(path or usual, key, folder)
    try:
        manifest = read_json(store_place.manifest()) or {}
    except UserError:  # damaged: whoever opens it says so, with what mends it
        manifest = {}
    return store_place._replace(key=str(manifest.get("key", key)))


def recording_config(config: ExperimentConfig) -> ExperimentConfig:
    """Return the run that makes the store of logits=recorded: the teacher's, in a root of its own."""
    record = config.stored.derive(path=None)
    return teacher_config(config).derive(root=f"{config.root}/recorded", record=record)


def corpus(config: ExperimentConfig) -> tuple[Corpus, dict[str, Any]]:
    """Return the text, and the arguments of packing it.

    A pretrained model brings its tokenizer. Without one, instructions use the tokenizer of the plain text.
    """
    source, packing_options = _packing(config, config.data, "data")
    if source.pairs and not packing_options["tokenizer"]:
        packing_options["tokenizer_of"] = plain_corpus(config)
    return source, packing_options


def plain_corpus(config: ExperimentConfig) -> tuple[Corpus, dict[str, Any]]:
    """Return the plain text beside the data, and the arguments of packing it, which are those of the data."""
    return _packing(config, plain_data(config), "plain")


def plain_data(config: ExperimentConfig) -> DataConfig:
    """Return the plain text as the data of a run."""
    shared = ("seq_len", "vocab", "tokenizer", "val_rows", "val_share", "special", "isolate")
    alike = {k: config.data.args[k] for k in shared if k in config.data.args}  # an old store's has no special
    return DataConfig.from_node({"tokens": None} | config.plain.to_dict() | alike, "plain")


def _packing(config: ExperimentConfig, data: Component, group: str) -> tuple[Corpus, dict[str, Any]]:
    make = conf.load(data.target, group)
    parameters = {*argument_types.parameters_of(make)[0], *packing.OPTIONS}
    for name in data.args.keys() - parameters:
        hint = f"leave {group}.{name} out"
        raise UserError(option=f"{group}.{name}", got=data.args[name], why="this data has no such option", hint=hint)
    source = cached_corpus(make, json.dumps(argument_types.checked(make, data.args, group)))
    if plugged := plugins.digests([data.target]):  # other code may make other text
        source = replace(source, fingerprint=source.fingerprint | {"plugins": plugged})
    packing_options = argument_types.checked(packing.pack, data.args, group)
    _check_isolation(source, group, packing_options)
    packing_options["code"] = provenance.component(group, data.name)
    if not source.words:
        packing_options["tokenizer"] = config.tokenizer
    elif tokenizer := data.args.get("tokenizer"):
        why, hint = "this data has a vocabulary of its own", "leave data.tokenizer out"
        raise UserError(option="data.tokenizer", got=tokenizer, why=why, hint=hint)
    return source, packing_options


def _check_isolation(source: Corpus, group: str, packing_options: dict[str, Any]) -> None:
    """Refuse to isolate the documents of rows that hold one each, and to pack text whose rows are full."""
    if packing_options.get("pack") and not source.pairs:
        raise UserError(
            option=f"{group}.pack",
            got=True,
            why="is for prompts with responses, and rows of plain text are full anyway",
            hint=f"leave {group}.pack out, or type data=instructions",
        )
    if packing_options.get("isolate") and (source.words or source.pairs):
        what = "a prompt with its response" if source.pairs else "one document"
        raise UserError(
            option=f"{group}.isolate",
            got=True,
            why=f"would do nothing, as each row of this data is {what}",
            hint=f"leave {group}.isolate out"
            + (f"; with {group}.pack=true, examples are isolated" * bool(source.pairs)),
        )


@cache
def cached_corpus(make: Callable[..., Corpus], arguments: str) -> Corpus:
    """Return a corpus, made once for all runs of a sweep. arguments: JSON, since those of a mixture have parts."""
    return make(**json.loads(arguments))


def teacher_config(config: ExperimentConfig) -> ExperimentConfig:
    """Return the run that makes a teacher of a size: language modelling with the defaults, not the student's settings.

    It is the run of `python train.py logits=none teacher=none student=SIZE trainer.steps=… lr.peak=… data=…`. On
    instructions it starts from a run on the plain text. Only start.steps and the other settings of that run are shared
    with the student. A named teacher with teacher.sft=true gets such a run too, from its own weights.
    """
    teacher = config.teacher
    start = "pretrained" if teacher.size and corpus(config)[0].pairs else "scratch"
    return _language_modelling(config, teacher, start, teacher.steps, teacher.batch, teacher.lr, teacher.seed,
                               teacher.precision)  # fmt: skip


def start_config(config: ExperimentConfig) -> ExperimentConfig | None:
    """Return the run that makes a student's first weights; None if its name or size alone determines them.

    Raises UserError for a stage that this student or data cannot have.
    """
    start, student = config.start, config.student
    if isinstance(start, FineTunedInit):
        if not corpus(config)[0].pairs:
            why = "needs instructions to fine-tune on, and this data is plain text"
            raise UserError(option="start", got="sft", why=why, hint="type data=instructions, or start=scratch")
        before, lr = "scratch" if student.name else "pretrained", start.sft_lr or fine_tuning_rate(student.name)
        return _language_modelling(config, student, before, start.sft_steps, start.sft_batch, lr, start.seed)
    if not isinstance(start, PretrainedInit):
        return None
    if student.name:
        why, hint = "this student is pretrained as it is", "leave start=pretrained out"
        conflict = f"student.name={student.name}"
        raise UserError(option="start", got="pretrained", conflict=conflict, why=why, hint=hint)
    pretraining = _language_modelling(config, student, "scratch", start.steps, start.batch, start.lr, start.seed)
    return pretraining.derive(data=plain_data(config))


def _language_modelling(
    config: ExperimentConfig, model: ModelConfig | TeacherConfig, start: str, steps: int, batch: int, lr: float,
    seed: int, precision: str = "fp32",
) -> ExperimentConfig:  # fmt: skip
    """Return a run on the config's data, with the defaults but for what is given here."""
    optimizer = ["optim=adamw"] if model.name else []  # as student=hub has it
    usual = default_config("teacher=none", "logits=none", f"start={start}", *optimizer)
    stage = {k: v for k, v in config.start.to_dict().items() if k in usual.start.to_dict() and k != "stage"}
    of_machine = {name: getattr(config.trainer, name) for name in ("accelerator", "gradient_checkpointing")}
    return usual.derive(
        seed=seed, lr={"peak": lr}, start=stage, student=ModelConfig(size=model.size, name=model.name),
        trainer={"steps": steps, "batch": batch, "micro_batch": batch, "precision": precision}
        | of_machine,
        data=config.data.derive(tokenizer=corpus(config)[1]["tokenizer"]),
        root=config.root, logger=config.logger, sweep=config.sweep, plain=config.plain, token_names=config.token_names,
    )  # fmt: skip

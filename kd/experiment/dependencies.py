"""From the composed config to what is to be done: the run, its data, its teacher and its store. No model, no torch."""

from __future__ import annotations

import copy
from functools import cache
from typing import NamedTuple

from kd.config import components as conf
from kd.config.compose import composed
from kd.config.rules import Settings, is_recorded, name_of, resolve, source_of, stored_part, tokenizer_name
from kd.data import packing
from kd.data.corpora import Corpus
from kd.errors import UserError
from kd.runs import provenance
from kd.runs.identity import identity, whole_as_float
from kd.runs.run import Run
from kd.store.location import FORMAT, Place
from kd.system import files, remote
from kd.system.files import read_json


class Plan(NamedTuple):
    """The run that settings describe, the settings of the runs that make its teacher and what its student starts from,
    and the place of its store."""

    run: Run
    teacher: Settings | None  # None if it is not to be made
    start: Settings | None
    store: Place | None


def plan(settings: Settings) -> Plan:
    """What is to be done; fast: no model, no torch. Data, teacher and store are part of a run's identity."""
    source, how = corpus(settings)
    teacher = store = None
    digests = {"data": packing.key(source, **how)}
    for role in ("student", "teacher"):
        if stamp := files.stamp(settings[role]["name"]):
            digests[f"{role}.name"] = stamp
    if (settings["teacher"]["size"] or settings["teacher"].get("sft")) and source_of(settings) != "cotrained":
        teacher = teacher_settings(settings)
        digests["teacher"] = plan(teacher).run.name
    if start := start_settings(settings):
        digests["start"] = plan(start).run.name
    if settings["lm"] == "plain":
        text, how = plain_corpus(settings)
        digests["plain"] = packing.key(text, **how)
    if source_of(settings) == "offline":
        part, name = stored_part(settings), settings["teacher"]["name"]
        told = {k: v for k, v in digests.items() if k in ("data", "teacher", "teacher.name")}
        of = [FORMAT, told, settings["trainer"]["precision"]]
        of += [whole_as_float(part)]
        of += [settings["logits"]["seed"] if part["name"] == "random" else None]
        of += [None if "teacher.name" in digests else name]  # of the Hub
        made = recording(settings)
        store = plan(made).store if made else place(settings, files.digest_of(of)[:16], settings["logits"]["path"])
        digests["store"] = store.key
    run = Run(settings["root"], identity(conf.flat(settings), **digests))
    if source_of(settings) == "none" and settings["record"]:
        store = place(settings, files.digest_of([run.name, stored_part(settings)])[:16], settings["record"]["path"])
    return Plan(run, teacher, start, store)


def place(settings: Settings, key: str, path: str | None) -> Place:
    """A store that is there already has the key that it was written with, whatever config reads it."""
    cache = remote.home(settings["root"]) / "stores"
    usual = f"{settings['root']}/stores/{key}" if remote.is_url(settings["root"]) else str(cache / key)
    found = Place(path or usual, key, cache)
    try:
        manifest = read_json(found.manifest()) or {}
    except UserError:  # damaged: said by who opens it, with what mends it
        manifest = {}
    return found._replace(key=str(manifest.get("key", key)))


def recording(settings: Settings) -> Settings | None:
    """The run that makes the store of logits=recorded: the teacher's own, in a root of its own; None for others."""
    if not is_recorded(settings):
        return None
    made = teacher_settings(settings) | {"root": f"{settings['root']}/recorded"}
    made["record"] = {**(settings["record"] or settings["truncation"]), "path": None}
    return made


def corpus(settings: Settings) -> tuple[Corpus, dict]:
    """The text, and how it is packed. Pretrained models bring a tokenizer; instructions take that of the plain text."""
    source, how = _packing(settings, settings["data"], "data")
    if source.pairs and not how["tokenizer"]:
        how["tokenizer_of"] = plain_corpus(settings)
    return source, how


def plain_corpus(settings: Settings) -> tuple[Corpus, dict]:
    """The plain text beside the data, and how it is packed: as the data is."""
    return _packing(settings, plain_data(settings), "plain")


def plain_data(settings: Settings) -> Settings:
    """Settings of a run on the plain text."""
    shared = ("seq_len", "vocab", "tokenizer", "val_rows", "val_share", "special")
    alike = {k: settings["data"][k] for k in shared if k in settings["data"]}  # a store of before has no special
    return {"tokens": None} | settings["plain"] | alike


def _packing(settings: Settings, node: Settings, group: str) -> tuple[Corpus, dict]:
    make = conf.load(node["_target_"], group)
    known = {"_target_", *conf.parameters_of(make)[0], *packing.OPTIONS}
    for name in node.keys() - known:
        raise UserError(f"{group}.{name}={node[name]}: no such option of this data.")
    source = cached_corpus(make, **conf.checked(make, node, group))
    how = conf.checked(packing.pack, node, group)
    how["code"] = provenance.component(group, name_of(node))
    if source.words and node["tokenizer"]:
        raise UserError(f"data.tokenizer={node['tokenizer']}: this data has a vocabulary of its own; leave it out.")
    if not source.words:
        how["tokenizer"] = tokenizer_name(settings)
    return source, how


@cache
def cached_corpus(make, **arguments):
    """A sweep asks for the same corpus once per run."""
    return make(**arguments)


def teacher_settings(settings: Settings) -> Settings:
    """A teacher of a size is itself a run: language modelling with the defaults, whatever the student's settings are.

    It is what `python train.py logits=none teacher=none student=SIZE trainer.steps=… lr.peak=… data=…` would be; on
    instructions, after a run on the plain text, for which alone start.steps and its like are the student's too. So is
    a named one with teacher.sft=true, from the weights it has.
    """
    of = settings["teacher"]
    start = "pretrained" if of["size"] and corpus(settings)[0].pairs else "scratch"
    student = {"size": of["size"], "name": of["name"]}
    return _language_modelling(settings, student, start, **{k: of[k] for k in ("steps", "batch", "lr", "seed")},
                               precision=of["precision"])  # fmt: skip


def start_settings(settings: Settings) -> Settings | None:
    """The run that made the weights which a student starts from; None where they are those that its name or size says.

    Raises UserError for a stage that this student or data cannot have.
    """
    of, student = settings["start"], settings["student"]
    if of["stage"] == "scratch":
        return None
    if of["stage"] == "pretrained":
        if student["name"]:
            raise UserError(f"start=pretrained: student.name={student['name']} is pretrained as it is; leave it out.")
        made = _language_modelling(settings, student, "scratch", of["steps"], of["batch"], of["lr"], of["seed"])
        return made | {"data": plain_data(settings)}
    if not corpus(settings)[0].pairs:
        raise UserError(
            "start=sft fine-tunes on instructions, and this data is plain text; type data=instructions, or "
            "start=scratch."
        )
    before, rate = ("scratch", 1e-4) if student["name"] else ("pretrained", 1e-3)
    return _language_modelling(
        settings, student, before, of["sft_steps"], of["sft_batch"], of["sft_lr"] or rate, of["seed"]
    )  # fmt: skip


@cache
def resolved(*typed: str) -> Settings:
    """Resolve these words, for callers that copy what they change: a sweep asks for the same teacher once per run."""
    return resolve(composed(*typed), list(typed))


def _language_modelling(
    settings: Settings, student: Settings, start: str, steps: int, batch: int, lr: float, seed: int,
    precision: str = "fp32",
) -> Settings:  # fmt: skip
    """A run on the data of settings, with the defaults but for what is given here."""
    typed = ["teacher=none", "logits=none", f"seed={seed}", f"lr.peak={lr}", f"start={start}"]
    typed += [f"trainer.steps={steps}", f"trainer.batch={batch}", f"trainer.micro_batch={batch}"]
    typed += ["optim=adamw"] if student["name"] else []  # as student=hub has it
    made = copy.deepcopy(resolved(*typed, f"trainer.precision={precision}"))
    made["data"] = settings["data"] | {"tokenizer": corpus(settings)[1]["tokenizer"]}
    made["student"] = student
    made["trainer"]["accelerator"] = settings["trainer"]["accelerator"]
    made["start"] |= {k: v for k, v in settings["start"].items() if k in made["start"] and k != "stage"}
    return made | {k: settings[k] for k in ("root", "logger", "sweep", "plain", "token_names")}

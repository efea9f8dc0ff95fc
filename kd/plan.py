"""From the composed config to what is to be done: the run, its data, its teacher and its store. No model, no torch."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd import config as conf
from kd import data, files, remote
from kd.corpora import Corpus
from kd.errors import UserError
from kd.guard import check_secrets
from kd.run import NO_SIGNAL, Run, group_of, identity, read_json

Settings = conf.Node
FORMAT = 1  # of stores


def resolve(cfg: DictConfig, typed: list[str]) -> Settings:
    """The config as plain containers, checked as far as that is possible before data and models are there."""
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} is needed here: type {missing[0]}=VALUE.")
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from None
    conf.check_targets(settings)
    conf.check_plain(settings)
    count_steps(settings, typed)
    check_secrets(f"{name}={value}" for name, value in conf.flat(settings).items())  # of the environment, too
    if settings["scale"] != "cpu":  # the runs of a sweep are not told of it
        raise UserError(f"scale={settings['scale']}: only a sweep has scales; type sweeps=scaling, or leave it out.")
    check_logits(settings, typed)
    check_ranks(settings)
    check_instructions(settings, typed)
    own = tokenizer_name(settings)
    if settings["data"]["_target_"] == "kd.corpora.markov":
        own = "the states of the chain"
    if own and any(word.lstrip("+").startswith("data.vocab=") for word in typed):
        raise UserError(f"data.vocab would do nothing: no tokenizer is trained, since there is {own}. Leave it out.")
    return settings


def count_steps(settings: Settings, typed: list[str]) -> None:
    """Make steps of trainer.tokens, in place; raises UserError where both were typed."""
    of, tokens = settings["trainer"], settings["trainer"].pop("tokens")
    if tokens is not None:
        if any(word.lstrip("+").startswith("trainer.steps=") for word in typed):
            raise UserError(f"trainer.tokens={tokens} and trainer.steps={of['steps']}: one of them says it all.")
        of["steps"] = -(-tokens // (of["batch"] * settings["data"]["seq_len"]))


def check_logits(settings: Settings, typed: list[str]) -> None:
    """Raise UserError where the source of logits lacks something, or leaves a word that was typed without effect."""
    how = source_of(settings)
    for word in typed:
        if how == "none" and group_of(word) in NO_SIGNAL:
            raise UserError(
                f"logits=none trains on text alone; {word} would do nothing: leave it out, or take logits=online."
            )
        if how in ("online", "cotrained") and group_of(word) == "record":
            raise UserError(
                f"logits={how} stores nothing; {word} would do nothing: leave it out, or take logits=offline to read "
                "what a store holds, or logits=none to record what a teacher says while it trains."
            )
    if how == "offline" and not 0 <= settings["logits"]["seed"] < 2**32:
        raise UserError(f"logits.seed={settings['logits']['seed']}: need a whole number from 0 to {2**32 - 1}.")
    if is_recorded(settings) and (not settings["teacher"]["size"] or stored_part(settings)["name"] == "full"):
        what = "truncation=full" if settings["teacher"]["size"] else f"teacher.size={settings['teacher']['size']}"
        raise UserError(
            f"logits=recorded, {what}: a teacher of a size is trained, and some of what it says at each step is kept: "
            "take teacher=1m, say, and truncation=top_p_k."
        )
    dropped, where = kept_of(settings["truncation"])["name"], settings["target"]["_target_"].rpartition(".")[2]
    if how != "none" and dropped in ("full", "random") and where in ("rest", "leftover"):
        raise UserError(
            f"target={where} says where the probability goes that a truncation drops, and truncation={dropped} "
            f"{'drops none' if dropped == 'full' else 'is a sample that adds up to 1'}: leave it out, or take "
            "truncation=top_k, top_p or top_p_k."
        )
    if how == "cotrained" and settings["teacher"]["name"] and settings["optim"]["_target_"] == "kd.optimizers.mup":
        raise UserError(
            "logits=cotrained has a pretrained teacher learn as the student does, and optim=mup is for sizes from "
            "scratch: type optim=adamw lr.peak=1e-4."
        )
    known = how == "none" or any(settings["teacher"].get(k) for k in ("size", "name"))
    if not known and not (how == "offline" and settings["logits"].get("path")):
        also = ", or logits.path=… to read a store, whoever wrote it" if how == "offline" else ""
        raise UserError(f"logits={how} needs a teacher: type teacher=1m, or logits=none to train without one{also}.")
    if how == "none" and settings["record"] and kept_of(settings["record"])["name"] == "full":
        raise UserError(
            "record=full: a teacher in training has another output layer at each step, so its whole distributions "
            "would take a number per token of the vocabulary. Take record=top_p_k, or record=random."
        )


def check_instructions(settings: Settings, typed: list[str]) -> None:
    """Raise UserError for a word that needs instructions to have an effect, and for what needs another loss."""
    plain_text = settings["data"]["_target_"] != "kd.instructions.instructions"
    loss = settings["loss"]["_target_"].rpartition(".")[2]
    for word in typed:
        if plain_text and group_of(word) in ("responses", "plain"):
            raise UserError(f"{word} would do nothing beside plain text; type data=instructions, or leave it out.")
    if rollout_of(settings) == "mixed" and loss != "minillm":
        raise UserError(
            f"rollout=mixed says what its text is worth to loss=minillm, and this is loss={loss}; type loss=minillm, "
            "or rollout=student."
        )
    if loss == "minillm" and not settings["loss"]["single_step"] and settings["rollout"].get("from_next"):
        raise UserError(
            "loss.single_step=false: nothing would tell of a token itself, as its return begins with the next one; "
            "type rollout.from_next=false."
        )
    if settings["routing"]["_target_"] == "kd.routing.uncertainty" and loss != "atkd":
        raise UserError(f"routing=uncertainty tells loss=atkd which tokens are hard, and this is loss={loss}; type "
                        "loss=atkd, or routing=none.")  # fmt: skip


def check_teacher(settings: Settings, source: Corpus) -> None:
    """Raise UserError where a teacher cannot be fine-tuned as asked."""
    of = settings["teacher"]
    if not of.get("sft"):
        return
    if not of["name"]:
        raise UserError(
            "teacher.sft=true needs a teacher by name: teacher=hub teacher.name=… (a size is always fine-tuned)."
        )
    if not source.pairs:
        raise UserError(
            "teacher.sft=true fine-tunes on instructions, and this data is plain text; type data=instructions."
        )
    if source_of(settings) == "cotrained":
        raise UserError("teacher.sft=true with logits=cotrained: that teacher learns on the way; leave it out.")


def check_rollout(settings: Settings, source: Corpus) -> None:
    """Raise UserError where nobody could write, or what is written would not be learned."""
    name, how = rollout_of(settings), source_of(settings)
    if settings["lm"] == "plain" and how in ("none", "cotrained"):
        why = "nothing of the instructions would be learned" if how == "none" else "the teacher learns from one text"
        raise UserError(f"lm=plain with logits={how}: {why}; leave it out, or type logits=online.")
    if settings["lm"] == "plain" and not source.pairs:
        raise UserError("lm=plain takes plain text beside instructions, and this data is plain text; leave it out.")
    if settings["loss"]["_target_"] == "kd.losses.minillm" and how != "none":
        of = settings["temperature"]
        if of != {**of, "_target_": "kd.temperature.fixed", "tau": 1.0, "student_tau": 1.0}:
            raise UserError("loss=minillm compares what was drawn at temperature 1; leave temperature out.")
    if name == "none":
        return
    said = f"rollout={name}"
    if not source.pairs:
        raise UserError(f"{said} writes responses to prompts, and this data is plain text; type data=instructions.")
    if how in ("offline", "cotrained"):
        why = "a store knows nothing of new text" if how == "offline" else "the teacher would write while it learns"
        raise UserError(f"{said} with logits={how}: {why}; type logits=online.")
    if how == "none" and name != "teacher":
        raise UserError(f"{said} would do nothing, as logits=none learns from the data alone; type logits=online.")
    if not any(settings["teacher"][k] for k in ("size", "name")):
        raise UserError(f"{said} needs a teacher; type teacher=1m.")
    if settings["routing"]["_target_"] == "kd.routing.entropy" and name != "teacher":
        raise UserError(
            f"{said} with routing=entropy: tokens that are not distilled are learned as text, and this text is the "
            "student's own. Leave routing out."
        )
    if settings["rollout"].get("engine") == "vllm" and settings["trainer"]["devices"] > 1:
        raise UserError("rollout.engine=vllm writes in one process; type trainer.devices=1, or rollout.engine=kd.")
    if settings["record"]:
        raise UserError(f"{said} and record: a store is of the text of the data. Leave one of them out.")


def rollout_of(settings: Settings) -> str:
    """Who writes: none, student, mixed, adaptive, teacher or pairs."""
    return settings["rollout"]["_target_"].rpartition(".")[2]


def check_ranks(settings: Settings) -> None:
    """Raise UserError where the batch, or what is to be done, cannot be shared out among several processes."""
    of = settings["trainer"]
    if of["devices"] > of["batch"]:
        raise UserError(
            f"trainer.devices={of['devices']}: a batch of {of['batch']} rows leaves some without a row; type "
            f"trainer.devices={of['batch']}, or trainer.batch={of['devices']}."
        )
    if of["devices"] > 1 and source_of(settings) == "none" and settings["record"]:
        raise UserError(
            f"trainer.devices={of['devices']}: one process records what a teacher says while it trains; type "
            "trainer.devices=1, or leave record out."
        )
    for option in ("trainer.strategy=fsdp", "trainer.shard_teacher=true"):
        name, value = option.removeprefix("trainer.").split("=")
        if str(of[name]).lower() != value:
            continue
        if of["devices"] == 1:
            raise UserError(f"{option}: there is one process and nothing to share; type trainer.devices=2.")
        check_shards(of, option)
    how = source_of(settings)
    if of["shard_teacher"] and (how == "offline" or (how == "cotrained" and of["strategy"] != "fsdp")):
        why = (
            "no teacher is loaded" if how == "offline" else "it learns as the student does; type trainer.strategy=fsdp"
        )
        raise UserError(f"trainer.shard_teacher=true would do nothing with logits={how}: {why}. Leave it out.")


def check_shards(of: Settings, option: str) -> None:
    """Raise UserError where the ranks would not ask for the same shards at the same time."""
    if of["batch"] % of["devices"]:
        raise UserError(
            f"{option}: each device needs as many rows as any other, and a batch has {of['batch']}; type "
            f"trainer.batch={of['batch'] // of['devices'] * of['devices']}."
        )
    if of["compile"]:
        raise UserError(f"{option}: trainer.compile=true is not made for models in shards; leave it out.")


class Plan(NamedTuple):
    """The run that settings describe, the settings of the runs that make its teacher and what its student starts from,
    and the place of its store."""

    run: Run
    teacher: Settings | None  # None if it is not to be made
    start: Settings | None
    store: Place | None


class Place(NamedTuple):
    """Where a store is, or is to be."""

    path: str  # folder or URL
    key: str  # of its content
    cache: Path  # keeps copies of what is read from a URL

    @property
    def folder(self) -> Path:
        return files.local(self.path, self.cache)

    def manifest(self) -> Path:
        return files.fetch(self.path, self.folder, "manifest.json")


def plan(settings: Settings) -> Plan:
    """What is to be done; fast: no model, no torch. Data, teacher and store are part of a run's identity."""
    source, packing = corpus(settings)
    check_rollout(settings, source)
    teacher = store = None
    digests = {"data": data.key(source, **packing)}
    for role in ("student", "teacher"):
        if stamp := files.stamp(settings[role]["name"]):
            digests[f"{role}.name"] = stamp
    check_teacher(settings, source)
    if (settings["teacher"]["size"] or settings["teacher"].get("sft")) and source_of(settings) != "cotrained":
        teacher = teacher_settings(settings)
        digests["teacher"] = plan(teacher).run.name
    if start := start_settings(settings):
        digests["start"] = plan(start).run.name
    if settings["lm"] == "plain":
        text, how = plain_corpus(settings)
        digests["plain"] = data.key(text, **how)
    if source_of(settings) == "offline":
        part, name = stored_part(settings), settings["teacher"]["name"]
        told = {k: v for k, v in digests.items() if k in ("data", "teacher", "teacher.name")}
        of = [FORMAT, told, settings["trainer"]["precision"]]
        of += [{k: float(v) if type(v) is int else v for k, v in part.items()}]
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


def source_of(settings: Settings) -> str:
    """none, online, cotrained or offline, from which recorded differs only in how its store is made."""
    name = str(settings["logits"].get("_target_")).rpartition(".")[2]
    return "offline" if name == "recorded" else name


def is_recorded(settings: Settings) -> bool:
    """Whether the store is what a teacher said while it was trained, made on demand."""
    return settings["logits"].get("_target_") == "kd.logits.recorded"


def recording(settings: Settings) -> Settings | None:
    """The run that makes the store of logits=recorded: the teacher's own, in a root of its own; None for others."""
    if not is_recorded(settings):
        return None
    made = teacher_settings(settings) | {"root": f"{settings['root']}/recorded"}
    made["record"] = {**(settings["record"] or settings["truncation"]), "path": None}
    return made


def kept_of(node: Settings) -> dict:
    """A truncation as {"name": …, setting: value}, without where it is recorded."""
    settings = {k: v for k, v in node.items() if k not in ("_target_", "_partial_", "path")}
    return {"name": node["_target_"].rpartition(".")[2], **settings}


def stored_part(settings: Settings) -> dict:
    """What the store keeps that these settings write."""
    return kept_of(settings["record"] or settings["truncation"])


def corpus(settings: Settings) -> tuple[Corpus, dict]:
    """The text, and how it is packed. Pretrained models bring a tokenizer; instructions take that of the plain text."""
    source, packing = _packing(settings, settings["data"], "data")
    if source.pairs and not packing["tokenizer"]:
        packing["tokenizer_of"] = plain_corpus(settings)
    return source, packing


def plain_corpus(settings: Settings) -> tuple[Corpus, dict]:
    """The plain text beside the data, and how it is packed: as the data is."""
    return _packing(settings, plain_data(settings), "plain")


def plain_data(settings: Settings) -> Settings:
    """Settings of a run on the plain text."""
    alike = {k: settings["data"][k] for k in ("seq_len", "vocab", "tokenizer", "val_rows", "val_share")}
    return {"tokens": None} | settings["plain"] | alike


def _packing(settings: Settings, node: Settings, group: str) -> tuple[Corpus, dict]:
    make = conf.load(node["_target_"], group)
    known = {"_target_", *inspect.signature(make).parameters, *inspect.signature(data.pack).parameters}
    for name in node.keys() - known:
        raise UserError(f"{group}.{name}={node[name]}: no such option of this data.")
    source = cached_corpus(make, **conf.checked(make, node, group))
    packing = conf.checked(data.pack, node, group)
    if source.words and node["tokenizer"]:
        raise UserError(f"data.tokenizer={node['tokenizer']}: this data has a vocabulary of its own; leave it out.")
    if not source.words:
        packing["tokenizer"] = tokenizer_name(settings)
    return source, packing


def tokenizer_name(settings: Settings) -> str | None:
    """The pretrained tokenizer to use: the one asked for, else that of a pretrained model; None trains one."""
    return settings["data"]["tokenizer"] or settings["student"]["name"] or settings["teacher"]["name"]


@cache
def composed(*typed: str) -> DictConfig:
    """The config of these words, to be read and not changed: a run asks several times, and Hydra takes its time."""
    return hydra.compose("config", list(typed))


@cache
def cached_corpus(make, **arguments):
    """A sweep asks for the same corpus once per run."""
    return make(**arguments)


def teacher_settings(settings: Settings) -> Settings:
    """A teacher of a size is itself a run: language modelling with the defaults, whatever the student's settings are.

    It is what `python train.py logits=none teacher=none student=SIZE trainer.steps=… lr.peak=… data=…` would be; on
    instructions, after a run on the plain text. So is a named one with teacher.sft=true, from the weights it has.
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
        raise UserError("start=sft fine-tunes on instructions, and this data is plain text; type data=instructions.")
    before, rate = ("scratch", 1e-4) if student["name"] else ("pretrained", 1e-3)
    return _language_modelling(
        settings, student, before, of["sft_steps"], of["sft_batch"], of["sft_lr"] or rate, of["seed"]
    )  # fmt: skip


def _language_modelling(
    settings: Settings, student: Settings, start: str, steps: int, batch: int, lr: float, seed: int,
    precision: str = "fp32",
) -> Settings:  # fmt: skip
    """A run on the data of settings, with the defaults but for what is given here."""
    typed = ["teacher=none", "logits=none", f"seed={seed}", f"lr.peak={lr}", f"start={start}"]
    typed += [f"trainer.steps={steps}", f"trainer.batch={batch}", f"trainer.micro_batch={batch}"]
    typed += ["optim=adamw"] if student["name"] else []  # as student=hub has it
    made = resolve(composed(*typed, f"trainer.precision={precision}"), typed)
    made["data"] = settings["data"] | {"tokenizer": corpus(settings)[1]["tokenizer"]}
    made["student"] = student
    made["trainer"]["accelerator"] = settings["trainer"]["accelerator"]
    made["start"] |= {k: v for k, v in settings["start"].items() if k in made["start"] and k != "stage"}
    return made | {k: settings[k] for k in ("root", "logger", "sweep", "plain")}

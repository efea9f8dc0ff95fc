"""Store of a run with logits=offline: found, checked, or written first. See kd/store."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from kd.config import components as conf
from kd.config import plugins, teacher_rules
from kd.config.compose import default_options
from kd.config.schema import ExperimentConfig
from kd.config.secrets import redacted
from kd.data.batches import IGNORE, Packed, to_batch
from kd.errors import UserError
from kd.experiment.dependencies import Plan, corpus
from kd.models import flops, hub
from kd.models.causal_lm import CausalLM
from kd.objective.chunked import chunks
from kd.objective.target import Target
from kd.runs.identity import model_name
from kd.runs.run import Run
from kd.store import transfer, writer
from kd.store.encoder import RowEncoder
from kd.store.format import MOST_DRAWS
from kd.store.location import FORMAT
from kd.store.reader import Store
from kd.store.recorder import Recorder
from kd.store.spec import FULL, are_comparable, covers, describe, draws_of
from kd.system import files
from kd.system.lease import lease
from kd.system.processes import is_alive, process_info
from kd.system.remote import Remote, is_url
from kd.teachers.online import OnlineTeacher
from kd.teachers.stored import window_share

ROWS = ("train.npy", "train_spans.npy", "train_marks.npy", "val.npy", "val_spans.npy", "val_marks.npy")
Keep = Callable[[Target], Target] | None  # what a store keeps of a target, with true probabilities; None for everything


def store_spec(config: ExperimentConfig, packed: Packed) -> dict:
    """Return all settings that a store's content depends on; the weights of an unavailable teacher are None."""
    teacher, name, weights = Plan.from_config(config).teacher, config.teacher.name, None
    called = name if name and not Path(name).is_dir() else model_name(config.flat(), "teacher")
    if teacher:
        run = Plan.from_config(teacher).run
        called, weights = run.name, (run.result() or {}).get("weights")
    elif name and Path(name).is_dir():
        weights = _weights(name, files.folder_fingerprint(name))
    elif name:
        weights = hub.revision(name)
    part = config.stored.spec
    if (draws_of(part) or 0) > MOST_DRAWS:
        group = "record" if config.record else "truncation"
        need, hint = f"at most {MOST_DRAWS:,} draws per position for a store", f"type {group}.draws={MOST_DRAWS}"
        raise UserError(option=f"{group}.draws", got=part["draws"], need=need, hint=hint)
    code, dtype = plugins.digests([config.stored.target]), config.teacher.dtype
    return {
        "format": FORMAT, "teacher": called, "weights": weights,
        "tokenizer": files.digest_of([v for k, v in sorted(packed.digests.items()) if k.startswith("tokenizer/")]),
        "data": files.digest_of([v for k, v in sorted(packed.digests.items()) if k in ROWS]),
        "truncation": part, "precision": config.trainer.precision,
        "seed": config.logits.seed if part["name"] == "random" and config.logits.source.reads_store else None,
    } | ({"plugin": code} if code else {}) | ({"dtype": dtype} if dtype else {})  # fmt: skip


@cache
def _weights(folder: str, stamp: str) -> dict[str, str]:
    """Return the digests of a model's files, computed once per process."""
    return {p.name: files.digest(p) for p in sorted(Path(folder).glob("*.safetensors"))}


def about_store(config: ExperimentConfig, packed: Packed, model: CausalLM, key: str) -> dict:
    """Return the entries of a store's manifest that its content does not depend on."""
    seq_len, head = config.data.seq_len, model.head
    return {
        "key": key, "words": write_command(config), "settings": redacted(config.to_dict()), "seq_len": seq_len,
        "vocab": head.vocab, "validation": len(packed.val), "head": {"softcap": head.softcap, "scale": head.scale},
        "cost": flops.cost(model.model, seq_len)._asdict(),
    }  # fmt: skip


def write_command(config: ExperimentConfig) -> str:
    """Return the words to type for the teacher, the data and the truncation of a store, without defaults."""
    teacher, part = config.teacher, config.stored.spec
    typed = [f"data={config.data.name}", f"truncation={part['name']}"]
    typed += [f"teacher={teacher.size or ('hub' if teacher.name else 'none')}"]
    typed += [f"plain={config.plain.name}"] if config.data.is_instructions else []
    if parts := config.data.args.get("parts"):  # of a mixture: one setting, whose parts have no defaults
        typed.append(f"data.parts={conf.typed(parts)}")
    settings = {k: v for k, v in config.flat().items() if not k.startswith(("truncation.", "start."))}
    unused = teacher_rules.unused_by(config)  # a preset for a teacher of a size may set them
    settings = {k: v for k, v in settings.items() if k not in unused}
    settings |= {f"truncation.{k}": v for k, v in part.items()}
    teacher_run = Plan.from_config(config).teacher
    if teacher_run and teacher_run.start.stage != "scratch" != config.start.stage:  # it was pretrained as the student
        typed.append(f"start={teacher_run.start.stage}")
        settings |= conf.flat({"start": teacher_run.start.to_dict()})
    if (tokenizer := corpus(config)[1]["tokenizer"]) != teacher.name:  # a pretrained student's
        settings |= {"data.tokenizer": tokenizer}
    usual = default_options("logits=offline", *typed)
    groups = (
        "token_names",
        "data.",
        "plain.",
        "start.",
        "teacher.",
        "truncation.",
        "logits.seed",
        "trainer.precision",
        "trainer.attention",
    )
    settings = {k: v for k, v in settings.items() if k.startswith(groups) and k in usual and v != usual[k]}
    typed += [f"{k}={conf.typed(v)}" for k, v in settings.items()]
    return shlex.join(typed)


def opened(config: ExperimentConfig, packed: Packed) -> Store | None:
    """Return the store of a run with logits=offline, if it exists; raise UserError if it does not match the run."""
    place, spec, truncation = Plan.from_config(config).store_place, store_spec(config, packed), config.truncation.spec
    window, nested = window_share(config.logits.window), config.truncation.nested
    if place.manifest().exists():
        store = Store(place.path, place.cache)
        expected = {k: v for k, v in spec.items() if k != "precision"} | {"truncation": truncation}
        expected["plugin"] = plugins.digests([config.truncation.target]) or None
        if config.teacher.exists and store.spec.get("dtype") != config.teacher.dtype:
            raise _other_dtype(store, config.teacher.dtype)
        by_path = config.logits.path is not None or config.logits.source.is_recorded
        store.check(expected, by_path, nested)
        _measurable(config, store.truncation)
        return store
    if not covers(spec["truncation"], truncation, nested):
        certain = are_comparable(spec["truncation"], truncation, nested)
        raise UserError(
            option="truncation",
            got=truncation["name"],
            conflict=f"record={spec['truncation']['name']}",
            why="needs more than the store would hold" if certain else "may need more than the store would hold",
            hint="record more, or leave record out to store what this truncation keeps",
        )
    _measurable(config, spec["truncation"])
    if window is not None and not config.logits.source.is_recorded:
        raise UserError(
            option="logits.window",
            got=config.logits.window,
            why=f"{place.path} does not exist, and a store that is written now, by a finished teacher, covers no "
            "window of its training",
            hint="leave logits.window out, or give a recorded store by logits.path=…",
        )
    return None


def _other_dtype(store: Store, dtype: str | None) -> UserError:
    stored = store.spec.get("dtype")
    return UserError(
        option="teacher.dtype",
        got=dtype,
        conflict=f"logits.path={store.path}",
        why=f"the teacher's weights were {f'in {stored}' if stored else 'as they are'} when it wrote this store",
        hint=f"type teacher.dtype={stored}" if stored else "leave teacher.dtype out",
    )


def _measurable(config: ExperimentConfig, held: dict) -> None:
    """Raise UserError for measures that need whole distributions if a store holds parts of them.

    For the routing, the most probable tokens are enough to estimate the teacher's certainty. A few draws are not.
    """
    routing = config.routing.name
    if routing != "none" and held["name"] == "random":
        raise UserError(
            option="routing",
            got=routing,
            why=f"is measured on the teacher's probabilities, and the store holds {describe(held)}, too little to tell "
            "where the teacher is sure",
            need="a store of the most probable tokens or of everything",
            hint="type record=top_k or record=full (without logits.path), logits=online, or routing=none",
        )
    name = config.temperature.name
    if name != "fixed" and held != FULL:
        raise UserError(
            option="temperature",
            got=name,
            why=f"is measured on the teacher's whole distribution, and the store holds {describe(held)}",
            need="a store of everything",
            hint="type record=full (without logits.path), logits=online, or temperature=fixed",
        )


def open_or_write(config: ExperimentConfig, packed: Packed, keep: Keep, teacher: Callable[[], CausalLM]) -> Store:
    """Return the store of a run with logits=offline. If it is missing, one process writes it while others wait."""
    store = opened(config, packed)
    if store is None:
        place = Plan.from_config(config).store_place
        run = Run(place.folder.parent, place.folder.name)
        url = is_url(place.path)
        held = lease(Remote(place.path, place.folder), process_info(), is_alive, True) if url else nullcontext()
        with run.lock(wait=True), held:  # one process of this machine, and of all machines that share a URL
            store = opened(config, packed) or write(config, packed, keep, teacher())
    if not is_url(store.path):  # of a URL, each file is checked when it has been copied
        store.verify()
    return store


def write_part(config: ExperimentConfig, packed: Packed, keep: Keep, model: CausalLM, part: tuple[int, int]) -> None:
    """Write one of several parts of the store that a config describes, to be merged with the others."""
    place, spec = Plan.from_config(config).store_place, store_spec(config, packed)
    if setting := config.data.isolation:
        model.check_isolation("teacher", setting)
    encoder = RowEncoder.finished(OnlineTeacher(model), spec, keep, config.trainer.accelerator)
    about = about_store(config, packed, model, place.key)
    writer.write(place.folder, spec, about, packed, encoder, config.trainer.micro_batch, part)


def write(config: ExperimentConfig, packed: Packed, keep: Keep, model: CausalLM) -> Store:
    """Write the store that a config describes, and open it."""
    write_part(config, packed, keep, model, (1, 1))
    place = Plan.from_config(config).store_place
    if is_url(place.path):
        transfer.upload(place.folder, place.path)
    store = opened(config, packed)
    assert store is not None, "the store was written just now"
    return store


def recorder(config: ExperimentConfig, packed: Packed, keep: Keep, model: CausalLM, start: int) -> Recorder:
    """Return the recorder of a model's logits during its training, from step `start` on."""
    assert keep is not None, "a recorder keeps a part of each distribution"
    run, place = Plan.from_config(config).run, Plan.from_config(config).store_place
    spec = store_spec(config, packed) | {"teacher": run.name, "weights": None}
    url = place.path if is_url(place.path) else None
    about = about_store(config, packed, model, place.key)
    return Recorder(place.folder, spec, about, keep, start, run / "checkpoints", url)


def compare(store: Store, packed: Packed, keep: Keep, model: CausalLM, accelerator: str, count: int = 8) -> str:
    """Return the distance of stored rows from recomputed ones as text; raise UserError if it is large."""
    index = np.unique(np.linspace(0, len(packed.train) - 1, count).astype(int))
    rows = packed.train[index]
    encoder = RowEncoder.finished(OnlineTeacher(model), store.spec, keep, accelerator)
    spans, marks = packed.train_spans, packed.train_marks
    seed = np.zeros(rows[:, 1:].shape, int)
    row_spans, row_marks = (None if x is None else x[index] for x in (spans, marks))
    batch = to_batch(rows, index, seed, row_spans, packed.boundary, row_marks)
    batch = move_data_to_device(batch._replace(teacher_rows=store.read(index, batch.ids.numpy())), encoder.device)
    mask = batch.labels != IGNORE
    held = store.signal(batch, mask)
    gaps, spread = [], []
    with torch.inference_mode(), encoder.computing():
        now = encoder.signal(packed.train, index, spans, packed.boundary, marks)[-1]
        for part in chunks(int(mask.sum()), 64):
            if store.draws:
                gap, variance = sample_log_likelihood_gap(now(part), held(part))
                spread.append(variance / store.draws)
            else:
                target = keep(now(part)) if keep else now(part)
                gap = divergence(target, held(part), store.manifest["vocab"])
            gaps.append(gap)
    gap = torch.cat(gaps)
    words = f"{len(index)} rows of {rows.shape[1] - 1} tokens recomputed by the teacher: "
    error = 0.0
    if store.draws:
        error = (torch.cat(spread).sum().sqrt() / len(gap)).item()
        words += (
            f"the draws that are stored have a log-probability {gap.mean():+.4f} nats from what it expects of them, "
            f"with a standard error of {error:.4f}."
        )
    else:
        words += (
            f"KL from what it says now to what is stored {gap.mean():.1e} nats in the mean, {gap.max():.1e} at most."
        )
    if not abs(gap.mean()) <= 0.01 + 5 * error:  # NaN is far, too
        why, hint = f"does not hold the probabilities of this teacher: {words}", "do not use this store"
        raise UserError(option=store.path, why=why, hint=hint)
    return words


def sample_log_likelihood_gap(now: Target, held: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gap of stored draws' mean log-probability to its expectation, and the variance of one draw [N].

    Two samples cannot be compared draw by draw: rounding in the last bit moves a draw to the next token.
    """
    p = now.logp.exp()
    expected = (p * now.logp).sum(-1)
    observed = (held.logp.exp() * now.logp.gather(-1, held.ids)).sum(-1)
    return observed - expected, ((p * now.logp.square()).sum(-1) - expected.square()).clamp(min=0)


def divergence(a: Target, b: Target, vocabulary: int) -> torch.Tensor:
    """Return KL(a || b) of two targets per position [N], nats. Residual mass is spread over the other tokens."""
    p, q = a.to_dense(vocabulary), b.to_dense(vocabulary)
    return (p.exp() * (p - q)).sum(-1)

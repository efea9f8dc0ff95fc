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
from omegaconf import OmegaConf

from kd.config import components as conf
from kd.config.compose import composed
from kd.config.rules import Settings, is_recorded, kept_of, name_of, of_instructions, stored_part
from kd.config.security import redacted
from kd.data.batches import IGNORE, Packed, to_batch
from kd.errors import UserError
from kd.experiment.dependencies import corpus, plan
from kd.models import flops, hub
from kd.models.causal_lm import Causal
from kd.objective.chunked import chunks
from kd.objective.target import Target
from kd.runs.identity import model_name
from kd.runs.run import Run
from kd.store import writer
from kd.store.format import MOST_DRAWS
from kd.store.location import FORMAT
from kd.store.reader import FULL, Store, said, within
from kd.store.recorder import Recorder
from kd.store.writer import Teacher
from kd.system import files
from kd.system.processes import alive, whereabouts
from kd.system.remote import Remote, is_url
from kd.teachers import sources

ROWS = ("train.npy", "train_spans.npy", "val.npy", "val_spans.npy")  # what packed data is
Keep = Callable[[Target], Target] | None  # what a store keeps of a target, with true probabilities; None for everything


def described(settings: Settings, packed: Packed) -> dict:
    """What a store of these settings is of; weights of a teacher that is not at hand are None."""
    teacher, name, weights = plan(settings).teacher, settings["teacher"]["name"], None
    called = name if name and not Path(name).is_dir() else model_name(conf.flat(settings), "teacher")
    if teacher:
        made = plan(teacher).run
        called, weights = made.name, (made.result() or {}).get("weights")
    elif name and Path(name).is_dir():
        weights = _weights(name, files.stamp(name))
    elif name:
        weights = hub.revision(name)
    part = stored_part(settings)
    if part.get("draws", 0) > MOST_DRAWS:
        raise UserError(f"draws={part['draws']}: a store counts at most {MOST_DRAWS:,} draws per position; take fewer.")
    return {
        "format": FORMAT, "teacher": called, "weights": weights,
        "tokenizer": files.digest_of([v for k, v in sorted(packed.digests.items()) if k.startswith("tokenizer/")]),
        "data": files.digest_of([v for k, v in sorted(packed.digests.items()) if k in ROWS]),
        "truncation": part, "precision": settings["trainer"]["precision"],
        "seed": settings["logits"].get("seed") if part["name"] == "random" else None,
    }  # fmt: skip


@cache
def _weights(folder: str, stamp: str) -> dict[str, str]:
    """Digests of a model's files, made once per process."""
    return {p.name: files.digest(p) for p in sorted(Path(folder).glob("*.safetensors"))}


def about_store(settings: Settings, packed: Packed, model: Causal, key: str) -> dict:
    """What a store's manifest says beside what it is of."""
    seq_len, head = settings["data"]["seq_len"], model.head
    return {
        "key": key, "words": words_of(settings), "settings": redacted(settings), "seq_len": seq_len,
        "vocab": head.vocab, "validation": len(packed.val), "head": {"softcap": head.softcap, "scale": head.scale},
        "cost": flops.cost(model.model, seq_len)._asdict(),
    }  # fmt: skip


def words_of(settings: Settings) -> str:
    """What to type for the teacher, the data and the truncation of a store; what is so by default is left out."""
    teacher, part = settings["teacher"], stored_part(settings)
    typed = [f"data={conf.flat(settings)['data']}", f"truncation={part['name']}"]
    typed += [f"teacher={teacher['size'] or ('hub' if teacher['name'] else 'none')}"]
    typed += [f"plain={name_of(settings['plain'])}"] if of_instructions(settings) else []
    own = {k: v for k, v in conf.flat(settings).items() if not k.startswith(("truncation.", "start."))}
    own |= {f"truncation.{k}": v for k, v in part.items()}
    made = plan(settings).teacher
    if made and made["start"]["stage"] != "scratch" != settings["start"]["stage"]:  # it was pretrained as the student
        typed.append(f"start={made['start']['stage']}")
        own |= conf.flat({"start": made["start"]})
    if (tokenizer := corpus(settings)[1]["tokenizer"]) != teacher["name"]:  # a pretrained student's
        own["data.tokenizer"] = tokenizer
    usual = conf.flat(OmegaConf.to_container(composed("logits=offline", *typed)))
    groups = ("token_names", "data.", "plain.", "start.", "teacher.", "truncation.", "logits.seed", "trainer.precision")
    own = {k: v for k, v in own.items() if k.startswith(groups) and k in usual and v != usual[k]}
    typed += [f"{k}={conf.typed(v)}" for k, v in own.items()]
    return shlex.join(typed)


def opened(settings: Settings, packed: Packed) -> Store | None:
    """The store of a run with logits=offline, if it is there; raises UserError if it is not what the run needs."""
    where, of, asked = plan(settings).store, described(settings, packed), kept_of(settings["truncation"])
    window = sources.share(settings["logits"]["window"])
    if where.manifest().exists():
        found = Store(where.path, where.cache)
        expected = {k: v for k, v in of.items() if k != "precision"} | {"truncation": asked}
        found.check(expected, by_path=settings["logits"].get("path") is not None or is_recorded(settings))
        _measurable(settings, found.truncation)
        return found
    if not within(asked, of["truncation"]):
        raise UserError(
            f"truncation={asked['name']} asks for more than record={of['truncation']['name']} would have the store "
            "hold. Record more, or leave record out to store just what is asked for."
        )
    _measurable(settings, of["truncation"])
    if window is not None and not is_recorded(settings):
        raise UserError(
            f"logits.window={settings['logits']['window']}: there is no store at {where.path}, and one that is written "
            "now, by a finished teacher, covers no window of its training. Leave it out, or give logits.path=…"
        )
    return None


def _measurable(settings: Settings, held: dict) -> None:
    """Raise UserError for what is measured on the whole distribution, of which a store holds a part.

    The most probable tokens tell well enough where a teacher is sure to route by, and a few draws do not.
    """
    routing = name_of(settings["routing"])
    if routing != "none" and held["name"] == "random":
        raise UserError(
            f"routing={routing} is measured on what the teacher says, and the store holds {said(held)}, too little to "
            "tell where it is sure. Take a store of the most probable tokens (record=top_k; without logits.path), of "
            "everything (record=full), logits=online, or routing=none."
        )
    name = name_of(settings["temperature"])
    if name != "fixed" and held != FULL:
        raise UserError(
            f"temperature={name} is measured on the teacher's whole distribution, and the store holds {said(held)}. "
            "Take a store of everything (record=full; without logits.path), logits=online, or temperature=fixed."
        )


def stored(settings: Settings, packed: Packed, keep: Keep, teacher: Callable[[], Causal]) -> Store:
    """The store of a run with logits=offline, written first if there is none, by one process while others wait."""
    found = opened(settings, packed)
    if found is None:
        where = plan(settings).store
        run = Run(where.folder.parent, where.folder.name)
        url = is_url(where.path)
        lease = Remote(where.path, where.folder).lease(whereabouts(), alive, True) if url else nullcontext()
        with run.lock(wait=True), lease:  # one process of this machine, and of all machines that share a URL
            found = opened(settings, packed) or write(settings, packed, keep, teacher())
    if "://" not in found.path:  # of a URL, each file is checked when it has been copied
        found.verify()
    return found


def write(
    settings: Settings, packed: Packed, keep: Keep, model: Causal, part: tuple[int, int] = (1, 1)
) -> Store | None:
    """Write the store that settings describe, and open it; None for a part, which is to be merged with others."""
    where, of = plan(settings).store, described(settings, packed)
    teacher = Teacher.finished(model, of, keep, settings["trainer"]["accelerator"])
    about = about_store(settings, packed, model, where.key)
    writer.write(where.folder, of, about, packed, teacher, settings["trainer"]["micro_batch"], part)
    if part[1] > 1:
        return None
    if "://" in where.path:
        writer.upload(where.folder, where.path)
    return opened(settings, packed)


def recorder(settings: Settings, packed: Packed, keep: Keep, model: Causal, start: int) -> Recorder:
    """What stores the logits of a model in training, from step `start` on; settings ask for that."""
    run, _, _, where = plan(settings)
    of = described(settings, packed) | {"teacher": run.name, "weights": None}
    url = where.path if "://" in where.path else None
    about = about_store(settings, packed, model, where.key)
    return Recorder(where.folder, of, about, keep, start, run / "checkpoints", url)


def compare(found: Store, packed: Packed, keep: Keep, model: Causal, accelerator: str, count: int = 8) -> str:
    """How far rows of a store are from what its teacher says now, in words; raises UserError where that is far."""
    index = np.unique(np.linspace(0, len(packed.train) - 1, count).astype(int))
    rows = packed.train[index]
    teacher = Teacher.finished(model, found.of, keep, accelerator)
    spans = packed.train_spans
    seed = np.zeros(rows[:, 1:].shape, int)
    batch = to_batch(rows, index, seed, None if spans is None else spans[index], packed.boundary)
    batch = move_data_to_device(batch._replace(stored=found.read(index, batch.ids.numpy())), teacher.device)
    kept = batch.labels != IGNORE
    held = found.source(batch, kept)
    found_off, spread = [], []
    with torch.inference_mode(), teacher.computing():
        now = teacher.signal(packed.train, index, spans, packed.boundary)[-1]
        for part in chunks(int(kept.sum()), 64):
            if found.draws:
                off, variance = surprise(now(part), held(part))
                spread.append(variance / found.draws)
            else:
                target = keep(now(part)) if keep else now(part)
                off = divergence(target, held(part), found.manifest["vocab"])
            found_off.append(off)
    off = torch.cat(found_off)
    words = f"{len(index)} rows of {rows.shape[1] - 1} tokens recomputed by the teacher: "
    error = 0.0
    if found.draws:
        error = (torch.cat(spread).sum().sqrt() / len(off)).item()
        words += (
            f"the draws that are stored have a log-probability {off.mean():+.4f} nats from what it expects of them, "
            f"with a standard error of {error:.4f}."
        )
    else:
        words += (
            f"KL from what it says now to what is stored {off.mean():.1e} nats in the mean, {off.max():.1e} at most."
        )
    if not abs(off.mean()) <= 0.01 + 5 * error:  # NaN is far, too
        raise UserError(f"{found.path} is not what this teacher says: {words}")
    return words


def surprise(now: Target, held: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the mean log-probability of stored draws is from its expectation, and the variance of one draw [N].

    Two samples cannot be compared draw by draw: a last bit of the teacher's arithmetic moves a draw to the next token.
    """
    p = now.logp.exp()
    mean = (p * now.logp).sum(-1)
    said = (held.logp.exp() * now.logp.gather(-1, held.ids)).sum(-1)
    return said - mean, ((p * now.logp.square()).sum(-1) - mean.square()).clamp(min=0)


def divergence(a: Target, b: Target, vocabulary: int) -> torch.Tensor:
    """KL(a || b) of two targets, per position [N], nats; what one leaves out is spread over the other tokens."""
    p, q = a.spread(vocabulary), b.spread(vocabulary)
    return (p.exp() * (p - q)).sum(-1)

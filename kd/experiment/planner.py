"""What runs will take, before any is begun: from their shapes, and from some steps of each, which are measured."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from kd.config.components import flat
from kd.config.rules import Settings, is_pretrained, name_of, of_instructions, source_of
from kd.data.batches import IGNORE, Batch, Packed, to_batch
from kd.data.tokenizer import vocabulary_size
from kd.experiment import stores
from kd.experiment.dependencies import plan, recording
from kd.experiment.prerequisites import check_tokenizers, prepare
from kd.models import causal_lm
from kd.models import flops as flops_module
from kd.models.causal_lm import Causal
from kd.models.flops import Cost
from kd.objective.chunked import Objective, fitting, with_sample
from kd.objective.target import KNOWN_BY, Target
from kd.parallel import collectives
from kd.rollout.strategies import Rollout, Writers
from kd.runs.identity import part_of_outcome, size_text
from kd.store.writer import Teacher, takes
from kd.system import files
from kd.system.console import Terminal, clock, console, silence_libraries, track
from kd.system.hardware import capacity, hold_in, out_of_memory
from kd.system.processes import peak_memory
from kd.system.remote import home
from kd.teachers import sources

STARTS = 8.0  # seconds that a process takes to load what it needs
SAMPLE = 1_000_000  # tokens that are enough to know a text by
PROBE = 2.0  # seconds for a measurement, which has three steps at least
ALIVE = 6  # tensors as wide as a chunk's logits at one time: logits, two distributions and what becomes of them
# What the time of a step does not depend on.
NO_SHAPE = ("seed", "trainer.steps", "trainer.val_every", "trainer.log_every", "alpha", "lr", "optim", "teacher.steps")


class Estimate(NamedTuple):
    """What a run, or the writing of a store, takes."""

    tokens: int
    seconds: float | None  # None where it could not be measured
    disk: int  # bytes
    parameters: int | None = None  # of the student
    flops: float | None = None
    memory: int | None = None  # bytes
    beside: int = 0  # bytes on disk as well, while it runs: two checkpoints
    active: int | None = None  # parameters that a token uses


class Step(NamedTuple):
    """What was measured of one shape; nothing where its models do not fit into memory."""

    costs: dict[str, Cost]
    rows: int = 1  # of a micro-batch
    micro_batch: float | None = None  # seconds
    optimizer: float = 0.0  # seconds
    kept: int = 0  # bytes, for the backward pass
    writing: float = 0.0  # seconds that a rollout takes for a micro-batch, whose responses never end
    answering: float = 0.0  # seconds that the student does
    wider: int = 1  # rows that a rollout makes of one


_measured: dict[str, Step] = {}  # a sweep has many runs of one shape


def sampled(settings: Settings) -> tuple[Settings, float]:
    """The settings with a sample of their text, which is packed in no time, and how many times as much is asked for."""
    of = settings["data"]
    if (of["tokens"] or 0) <= SAMPLE:
        return settings, 1.0
    return settings | {"data": of | {"tokens": SAMPLE}}, of["tokens"] / SAMPLE


def of_run(
    settings: Settings, packed: Packed, times: float, objective: Objective, rollout: Callable[..., Rollout], vocab: int
) -> Estimate:
    """Of a run on `times` as many rows as are packed. Its teacher may be still to be made; its size tells as much.

    What is written is counted as long as it may be: models that have learned nothing do not end.
    """
    shape = {k: v for k, v in part_of_outcome(flat(settings)).items() if not k.startswith(NO_SHAPE)}
    shape |= {k: settings["trainer"][k] for k in ("accelerator", "devices", "strategy")}
    key = json.dumps([shape, vocab], sort_keys=True)
    loaded = before_measuring()
    if key not in _measured:
        _measured[key] = _fitting(settings, packed, objective, rollout, vocab)
    step, of, seq_len, how = _measured[key], settings["trainer"], settings["data"]["seq_len"], source_of(settings)
    student, teacher = step.costs["student"], step.costs.get("teacher")
    rows = of["steps"] * of["batch"]
    positions = rows * step.wider * seq_len
    beside = rows * seq_len if settings["lm"] == "plain" else 0  # of plain text
    tokens = round(rows * step.wider * packed.counted) + beside
    once = sum(flops_module.step_flops(how, flat(settings)["routing"] != "none", student, teacher))
    # All rows once by a teacher before training, or some of those of the steps.
    if name_of(settings["rollout"]) == "teacher":
        written = len(packed.train) * times
    else:
        written = rows * rollout(None).writes / of["devices"]
    seconds = None
    if step.micro_batch is not None:
        parts = -(-of["batch"] // of["devices"] // step.rows)
        seconds = STARTS + of["steps"] * (parts * step.micro_batch + step.optimizer)
        # A validation is forward passes alone, of the student and, if there is one, of the teacher.
        looked = (-(-of["steps"] // of["val_every"]) + is_pretrained(settings)) * packed.val[:, 1:].size / of["devices"]
        looked *= student.flops_per_token + (teacher.flops_per_token if teacher else 0)
        seconds += looked / once * step.micro_batch / (step.rows * step.wider * seq_len)
        seconds += written / step.rows * step.writing
        if packed.val_spans is not None:
            seconds += settings["responses"]["samples"] * len(packed.val) / step.rows * step.answering
    flops = positions * once + beside * 3 * student.flops_per_token  # without those of writing
    learned = student.parameters + (teacher.parameters if how == "cotrained" else 0)
    memory = held(step.costs, settings) + step.kept
    if collectives.device(of["accelerator"]).type == "cpu":
        memory += loaded
    disk, active = 4 * student.parameters, student.active_parameters
    return Estimate(tokens, seconds, disk, student.parameters, flops, memory, 24 * learned, active)


@cache
def before_measuring() -> int:
    """Bytes that libraries and data take in a process before it makes a model, as in a run."""
    return peak_memory()


def held(costs: dict[str, Cost], settings: Settings) -> int:
    """Bytes of weights, and of gradients and AdamW's two moments of what learns."""
    half = settings["trainer"]["precision"] == "bf16"
    # A teacher that is loaded; beside language modelling alone for the validation.
    each = {"cotrained": 16, "offline": 0}.get(source_of(settings), 2 if half else 4)
    return 16 * costs["student"].parameters + (each * costs["teacher"].parameters if "teacher" in costs else 0)


def of_store(settings: Settings, packed: Packed, times: float, keep, vocab: int, described: dict) -> Estimate:
    """Of writing the store that a run reads, of `times` as many rows as are packed.

    Of an untrained teacher, which a nucleus keeps more of than of any.
    """
    of, seq_len = settings["trainer"], settings["data"]["seq_len"]
    model = _teacher(settings, vocab)
    teacher = Teacher.finished(model, described, keep, of["accelerator"])
    rows = len(packed.train) * times
    flops = rows * seq_len * flops_module.cost(model.model, seq_len).flops_per_token
    tokens, size, beside, seconds = takes(teacher, packed, of["micro_batch"], rows)
    return Estimate(tokens, seconds, int(size) + beside, flops=flops)


def _teacher(settings: Settings, vocab: int) -> Causal:
    of = settings["teacher"]
    return causal_lm.build(of["size"], of["name"], vocab, settings["data"]["seq_len"], "teacher.name")


def _fitting(settings: Settings, *of) -> Step:
    """What is measured of as many rows at once as memory holds: a run halves them, too."""
    rows = min(settings["trainer"]["micro_batch"], settings["trainer"]["batch"])
    try:
        return _measure(settings, *of)
    except Exception as error:
        if rows == 1 or not out_of_memory(error):
            raise
    return _fitting(settings | {"trainer": settings["trainer"] | {"micro_batch": rows // 2}}, *of)


def _measure(
    settings: Settings, packed: Packed, objective: Objective, rollout: Callable[..., Rollout], vocab: int
) -> Step:
    """Some steps of a run's own models, shapes and objective; values of weights do not matter here."""
    trainer, seq_len, how = settings["trainer"], settings["data"]["seq_len"], source_of(settings)
    device = collectives.device(trainer["accelerator"])
    costs = {
        role: flops_module.cost_of(of["size"], of["name"], vocab, seq_len, f"{role}.name")
        for role in ("student", "teacher")
        if (of := settings[role])["size"] or of["name"]
    }
    if held(costs, settings) > 0.9 * capacity(device):
        return Step(costs)
    student = causal_lm.build(**settings["student"], vocab=vocab, seq_len=seq_len, option="student.name").to(device)
    needed = how in ("online", "cotrained") or name_of(settings["rollout"]) == "teacher"
    teacher = _teacher(settings, vocab) if needed else None
    half = trainer["precision"] == "bf16"
    if teacher:
        teacher.to(device).requires_grad_(how == "cotrained")
        if half and how == "online":
            hold_in(torch.bfloat16, teacher)
    rows = packed.train[: min(trainer["micro_batch"], trainer["batch"])]
    spans = None if packed.train_spans is None else packed.train_spans[: len(rows)]
    batch = to_batch(rows, np.arange(len(rows)), np.zeros(rows[:, 1:].shape, np.int64), spans, packed.boundary)
    batch = Batch(*(x.to(device) for x in batch[:4]))
    writers = Writers(student, teacher, packed.end, 0)
    writing = answering = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        if spans is not None:
            _, answering = _timed(device, lambda: writers.write(batch, "student"))
        write = rollout(writers, **({"engine": "kd"} if "engine" in settings["rollout"] else {}))
        if write.writes:
            batch, writing = _timed(device, lambda: write.write(batch))
    kept = batch.labels != IGNORE
    known = {name: torch.ones(int(kept.sum()), device=device) for name in KNOWN_BY}
    source = {"online": sources.online, "cotrained": sources.cotrained}.get(how, sources.none)(teacher)
    if how == "offline":
        source = partial(_stored, torch.linspace(0, 1, vocab, device=device).sin().log_softmax(-1))
    optimizer = torch.optim.AdamW([p for m in (student, teacher) if m for p in m.parameters() if p.requires_grad], 0.0)

    def loss(watched=nullcontext) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            signal = source(batch, kept) if source else None
            with watched():
                hidden = student.hidden(batch.ids)[kept]
            told = with_sample(signal, known) if signal else None
            total = objective(student.head, hidden, batch.labels[kept], told, 0.5 if signal else 0.0).total
            if how == "cotrained":
                total = total + objective(teacher.head, signal.hidden, batch.labels[kept], None, 0.0).total
        return total

    saved = {p.untyped_storage().data_ptr(): 0 for p in student.parameters()}

    def save(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    loss(lambda: torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)).backward()
    wide = min(int(kept.sum()), objective.chunk or fitting(student.head)) * vocab * 4 * ALIVE
    passes, steps, begun = [], [], _now(device)
    while len(passes) < 3 or _now(device) - begun < PROBE:
        start = _now(device)
        loss().backward()
        between = _now(device)
        optimizer.step()
        passes.append(between - start)
        steps.append(_now(device) - between)
    return Step(
        costs, len(rows), statistics.median(passes), statistics.median(steps), kept=sum(saved.values()) + wide,
        writing=writing, answering=answering, wider=len(batch.ids) // len(rows),
    )  # fmt: skip


def _timed(device: torch.device, work: Callable[[], Batch]) -> tuple[Batch, float]:
    start = _now(device)
    return work(), _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _stored(logp: Tensor, batch: Batch, kept: Tensor):
    """A source that has a target at hand, as one that reads a store does."""
    label, seed = batch.labels[kept], batch.seed[kept]
    return lambda rows: Target(label[rows], logp.expand(len(label[rows]), -1), seed=seed[rows], whole=True)


COLUMNS = ("parameters", "tokens", "FLOPs", "time", "memory", "disk")
LEAST = ("parameters", "tokens", "disk", "memory")  # columns that a narrow terminal goes without, the first one first


def print_rows(rows: dict[str, list[str]]) -> None:
    """Print a table with a line for each run; a narrow terminal gets shorter names and fewer columns."""
    short = dict(zip(shortened(list(rows)), rows.values(), strict=True))
    tries = [(rows, ()), *((short, LEAST[:count]) for count in range(len(LEAST) + 1))]
    for named, left_out in tries:
        table = Table(box=None, pad_edge=False)
        table.add_column("run", no_wrap=True)
        shown = [number for number, column in enumerate(COLUMNS) if column not in left_out]
        for number in shown:
            table.add_column(COLUMNS[number], justify="right", no_wrap=True)
        for name, amounts in named.items():
            table.add_row(name, *(amounts[number] for number in shown))
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        if not console.is_terminal:  # no width to keep to
            Terminal(stderr=True, highlight=False, width=width).print(table)
            return
        if width <= console.width:
            break
    console.print(table)


def shortened(names: list[str]) -> list[str]:
    """Names of runs without words whose key has one value in all that have it, as long as no two become the same."""
    values: dict[str, set[str]] = {}
    for name in names:
        for word in name.split(" "):
            values.setdefault(word.partition("=")[0], set()).add(word)
    short = [
        " ".join(w for w in name.split(" ") if "=" not in w or len(values[w.partition("=")[0]]) > 1) for name in names
    ]
    return short if len({*short}) == len(names) and all(short) else names


def show(made: dict[str, Estimate], names: dict[str, str], done: int, settings: Settings, at_once: float) -> None:
    """A line for each of `made` (name of its folder -> estimate), called as `names` say, and what all take together.

    settings: of one of the runs, for where they run.
    """
    if not made:
        console.print("Nothing is left to do.")
        return
    rows = {}
    for name, of in made.items():
        size = of.parameters and size_text(of.parameters, of.active).replace(" parameters", "")
        takes = (
            size, f"{of.tokens:,}", of.flops and f"{of.flops:.1e}",
            of.seconds and clock(of.seconds), of.memory and files.amount(of.memory), files.amount(of.disk),
        )  # fmt: skip
        rows[names.get(name, name)] = [amount or "–" for amount in takes]
    print_rows(dict(zip(shortened(list(rows)), rows.values(), strict=True)))
    root, device = home(settings["root"]).resolve(), collectives.device(settings["trainer"]["accelerator"])
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    at_once = min(at_once, len(made))
    disk = sum(of.disk for of in made.values()) + at_once * max(of.beside for of in made.values())
    # Each GPU has one run, and a machine's memory all that run at once.
    memory = max(of.memory or 0 for of in made.values()) * (1 if device.type == "cuda" else at_once)
    free, says = shutil.disk_usage(there).free, f"{len(made)} to do{f', {done} done before' if done else ''}: "
    says += f"{sum(of.flops or 0 for of in made.values()):.1e} FLOPs"
    if all(of.seconds for of in made.values()):
        says += f", about {clock(sum(of.seconds for of in made.values()))} one after another"
    says += f"; {files.amount(disk)} of disk at most, where {files.amount(free)} are free. Nothing was started."
    if of_instructions(settings):
        says += " Responses that models write are taken to be as long as they may be, and count to the time alone."
    console.print(says, soft_wrap=True)
    for what, needed, has in (("memory", memory, capacity(device)), ("disk", disk, free)):
        if needed > has:
            text = f"That needs {files.amount(needed)} of {what}, and there are {files.amount(has)}."
            console.print(text, style="red", soft_wrap=True)


def estimate(settings: Settings) -> dict[str, Estimate]:
    """Return what a run takes, and before it its teacher and its store, by name; nothing of what is done."""
    run, teacher, start, where = plan(settings)
    if not settings["force"] and run.result() is not None:
        return {}
    less, times = sampled(settings)
    packed, components = prepare(less)
    check_tokenizers(settings, components.tokenizer, settings["teacher"]["name"])
    vocab, stored = vocabulary_size(components.tokenizer), source_of(settings) == "offline"
    record, there = recording(settings), stored and where.manifest().exists()
    first = record or teacher
    made = estimate(first) if first and not there else {}
    made |= estimate(start) if start else {}
    if stored and not there and not record:
        of = stores.described(settings, packed)
        made[f"store {where.folder.name}"] = of_store(settings, packed, times, components.keep, vocab, of)
    return made | {run.name: of_run(settings, packed, times, components.objective, components.rollout, vocab)}


def show_plan(all_settings: list[Settings], said: list[str], at_once: float) -> None:
    """Print what runs take, called as `said`, so many at once, and what is made first for them; each thing once."""
    silence_libraries()
    made, names = {}, {plan(of).run.name: words for of, words in zip(all_settings, said, strict=True)}
    for of in track(all_settings, "measuring steps"):
        made |= {name: takes for name, takes in estimate(of).items() if name not in made}
    done = sum(not of["force"] and plan(of).run.result() is not None for of in all_settings)
    show(made, names, done, all_settings[0], at_once)

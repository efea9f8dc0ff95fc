"""Estimates of time, memory and disk before runs begin, from their shapes and from some measured steps."""

from __future__ import annotations

import json
import shutil
from functools import cache
from typing import NamedTuple

from rich.table import Table

from kd.config.schema import ExperimentConfig
from kd.data.batches import Packed
from kd.data.tokenizer import vocabulary_size
from kd.experiment import stores
from kd.experiment.components import Components
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import check_tokenizers, prepare
from kd.experiment.step_timing import (
    Step,
    alpha_kind,
    build_teacher_model,
    held,
    measure,
    moment_bytes,
    teacher_by_cost,
)
from kd.models import flops as flops_module
from kd.parallel import collectives
from kd.runs.identity import identity_settings, size_text
from kd.store.cost import estimate_cost
from kd.store.encoder import RowEncoder
from kd.system import files
from kd.system.console import Terminal, console, format_duration, silence_libraries, track
from kd.system.hardware import capacity
from kd.system.processes import peak_memory
from kd.system.remote import local_root
from kd.teachers.online import OnlineTeacher

STARTS = 8.0  # seconds that a process takes to load what it needs
SAMPLE = 1_000_000  # tokens that are enough to know a text by
# Settings that the time of a step does not depend on.
NO_SHAPE = ("seed", "trainer.steps", "trainer.val_every", "trainer.log_every", "alpha", "lr", "optim", "teacher.steps")


class Estimate(NamedTuple):
    """Time, memory and disk that a run, or the writing of a store, takes."""

    tokens: int
    seconds: float | None  # None where it could not be measured
    disk: int  # bytes
    parameters: int | None = None  # of the student
    flops: float | None = None
    memory: int | None = None  # bytes
    temporary_disk: int = 0  # bytes on disk as well, while it runs: two checkpoints
    active: int | None = None  # parameters that a token uses
    trainable: int | None = None  # parameters that learn


_measured: dict[str, Step] = {}  # a sweep has many runs of one shape


def sampled(config: ExperimentConfig) -> tuple[ExperimentConfig, float]:
    """Return a config with a sample of its text, which is packed fast, and the ratio of the full text to the sample."""
    tokens = config.data.tokens or 0
    if tokens <= SAMPLE:
        return config, 1.0
    return config.derive(data={"tokens": SAMPLE}), tokens / SAMPLE


def estimate_run(
    config: ExperimentConfig, packed: Packed, times: float, components: Components, vocab: int
) -> Estimate:
    """Return the estimate of a run on `times` as many rows as are packed. The teacher need not exist yet.

    Generated text counts with its greatest length, since untrained models do not end their responses.
    """
    shape = {k: v for k, v in identity_settings(config.flat()).items() if not k.startswith(NO_SHAPE)}
    trainer, seq_len = config.trainer, config.data.seq_len
    shape |= {
        "accelerator": trainer.accelerator,
        "devices": trainer.ranks,
        "strategy": trainer.strategy,
        "optim": config.optim.name,
        "gradient_checkpointing": trainer.gradient_checkpointing,
    }
    key = json.dumps([shape, vocab, alpha_kind(components)], sort_keys=True)
    loaded = before_measuring()
    if key not in _measured:
        _measured[key] = measure(config, packed, components, vocab)
    step = _measured[key]
    student, teacher = step.costs["student"], step.costs.get("teacher")
    rows = trainer.steps * trainer.batch
    positions = rows * step.wider * seq_len
    plain_tokens = rows * seq_len if config.lm == "plain" else 0
    tokens = round(rows * step.wider * packed.mean_target_tokens) + plain_tokens
    planned = teacher_by_cost(config, components, step.costs, vocab)
    forward_and_backward = flops_module.step_flops(student, step.trainable)
    once = forward_and_backward + planned.flops_per_token(config.routing.name != "none")
    # All rows once by a teacher before training, or some of those of the steps.
    if config.rollout.by_teacher:
        written = len(packed.train) * times
    else:
        written = rows * components.rollout(None).sampling_rate / trainer.ranks
    seconds = _seconds(config, packed, step, once, written)
    flops = positions * once + plain_tokens * forward_and_backward  # without those of writing
    learned = step.trainable + (teacher.parameters if teacher and planned.trainable else 0)
    memory = held(step.costs, step.trainable, config) + step.saved_bytes
    if collectives.device(trainer.accelerator).type == "cpu":
        memory += loaded
    copies = 1 + (Plan.from_config(config).pruned is not None)  # first weights made of the teacher stay on disk
    disk, active = 4 * student.parameters * copies, student.active_parameters
    checkpoints = 2 * (4 + moment_bytes(config)) * learned
    return Estimate(tokens, seconds, disk, student.parameters, flops, memory, checkpoints, active, step.trainable)


def _seconds(config: ExperimentConfig, packed: Packed, step: Step, once: float, written: float) -> float | None:
    """Return the seconds of a run with steps like this one; None if the step was not measured.

    once: FLOPs of one position of a step. written: rows that a model writes, before training or in the steps.
    """
    if step.micro_batch is None:
        return None
    trainer, student, teacher = config.trainer, step.costs["student"], step.costs.get("teacher")
    parts = -(-trainer.batch // trainer.ranks // step.rows)
    seconds = STARTS + trainer.steps * (parts * step.micro_batch + step.optimizer)
    # A validation is forward passes alone, of the student and, if there is one, of the teacher.
    looked = -(-trainer.steps // trainer.val_every) + config.is_pretrained
    looked = looked * packed.val[:, 1:].size / trainer.ranks
    looked *= student.flops_per_token + (teacher.flops_per_token if teacher else 0)
    seconds += looked / once * step.micro_batch / (step.rows * step.wider * config.data.seq_len)
    seconds += written / step.rows * step.writing
    if packed.val_spans is not None:
        seconds += config.responses.samples * len(packed.val) / step.rows * step.answering
    return seconds


@cache
def before_measuring() -> int:
    """Return the bytes that libraries and data take in a process before it makes a model."""
    return peak_memory()


def estimate_store(config: ExperimentConfig, packed: Packed, times: float, keep, vocab: int, spec: dict) -> Estimate:
    """Return the estimate of writing the store that a run reads, for `times` as many rows as are packed.

    It uses an untrained teacher, for which a nucleus keeps the most tokens: an upper bound.
    """
    trainer, seq_len = config.trainer, config.data.seq_len
    model = build_teacher_model(config, vocab)
    encoder = RowEncoder.finished(OnlineTeacher(model), spec, keep, trainer.accelerator)
    rows = len(packed.train) * times
    flops = rows * seq_len * flops_module.cost(model.model, seq_len).flops_per_token
    tokens, size, rest, seconds = estimate_cost(encoder, packed, trainer.micro_batch, rows)
    return Estimate(tokens, seconds, int(size) + rest, flops=flops)


COLUMNS = ("parameters", "tokens", "FLOPs", "time", "memory", "disk")
LEAST = ("parameters", "tokens", "disk", "memory")  # columns that a narrow terminal goes without, the first one first


def print_rows(rows: dict[str, list[str]]) -> None:
    """Print a table with a line for each run; a narrow terminal gets fewer columns."""
    for count in range(len(LEAST) + 1):
        table = Table(box=None, pad_edge=False)
        table.add_column("run", no_wrap=True)
        shown = [number for number, column in enumerate(COLUMNS) if column not in LEAST[:count]]
        for number in shown:
            table.add_column(COLUMNS[number], justify="right", no_wrap=True)
        for name, amounts in rows.items():
            table.add_row(name, *(amounts[number] for number in shown))
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        if not console.is_terminal:  # no width to keep to
            Terminal(stderr=True, highlight=False, width=width).print(table)
            return
        if width <= console.width:
            break
    console.print(table)


def shortened(names: list[str]) -> list[str]:
    """Return short names of runs: without words whose key has only one value, unless two names would become equal."""
    values: dict[str, set[str]] = {}
    for name in names:
        for word in name.split(" "):
            values.setdefault(word.partition("=")[0], set()).add(word)
    short = [
        " ".join(w for w in name.split(" ") if "=" not in w or len(values[w.partition("=")[0]]) > 1) for name in names
    ]
    return short if len({*short}) == len(names) and all(short) else names


def _amounts(estimate: Estimate) -> list[str]:
    """Return an estimate as text, in the order of COLUMNS."""
    size = estimate.parameters and size_text(estimate.parameters, estimate.active, estimate.trainable, "")
    amounts = (
        size, f"{estimate.tokens:,}", estimate.flops and f"{estimate.flops:.1e}",
        estimate.seconds and format_duration(estimate.seconds),
        estimate.memory and files.format_bytes(estimate.memory), files.format_bytes(estimate.disk),
    )  # fmt: skip
    return [amount or "–" for amount in amounts]


def show(
    estimates: dict[str, Estimate], names: dict[str, str], done: int, config: ExperimentConfig, at_once: float
) -> None:
    """Print a line for each estimate (name of the folder -> estimate), and the total.

    names: folder -> name to print. config: that of any run, for the machine.
    """
    if not estimates:
        console.print("Nothing is left to do.")
        return
    rows = {names.get(name, name): _amounts(estimate) for name, estimate in estimates.items()}
    print_rows(dict(zip(shortened(list(rows)), rows.values(), strict=True)))
    root, device = local_root(config.root).resolve(), collectives.device(config.trainer.accelerator)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    each, at_once = estimates.values(), min(at_once, len(estimates))
    disk = sum(estimate.disk for estimate in each) + at_once * max(estimate.temporary_disk for estimate in each)
    # Each GPU has one run, and a machine's memory all that run at once.
    memory = max(estimate.memory or 0 for estimate in each) * (1 if device.type == "cuda" else at_once)
    free = shutil.disk_usage(existing).free
    summary = f"{len(estimates)} to do{f', {done} done before' if done else ''}: "
    summary += f"{sum(estimate.flops or 0 for estimate in each):.1e} FLOPs"
    seconds = [estimate.seconds for estimate in each if estimate.seconds]
    if len(seconds) == len(estimates):
        summary += f", about {format_duration(sum(seconds))} one after another"
    summary += (
        f"; {files.format_bytes(disk)} of disk at most, where {files.format_bytes(free)} are free. Nothing was started."
    )
    if config.data.is_instructions:
        summary += " Responses that models write are taken to be as long as they may be, and count to the time alone."
    console.print(summary, soft_wrap=True)
    for what, needed, has in (("memory", memory, capacity(device)), ("disk", disk, free)):
        if needed > has:
            text = f"That needs {files.format_bytes(needed)} of {what}, and there are {files.format_bytes(has)}."
            console.print(text, style="red", soft_wrap=True)


def estimate(config: ExperimentConfig) -> dict[str, Estimate]:
    """Return the estimates of a run, its teacher and its store by name. Finished ones are left out."""
    run, teacher, start, place, record, pruned = Plan.from_config(config)
    if not config.force and run.result() is not None:
        return {}
    less, times = sampled(config)
    packed, components = prepare(less)
    check_tokenizers(config, components.tokenizer, config.teacher.name)
    vocab, stored = vocabulary_size(components.tokenizer), config.logits.source.reads_store
    exists = stored and place is not None and place.manifest().exists()
    first = record or teacher
    estimates = estimate(first) if first and (pruned or not exists) else {}
    estimates |= estimate(start) if start else {}
    if stored and place is not None and not exists and not record:
        spec = stores.store_spec(config, packed)
        estimates[f"store {place.folder.name}"] = estimate_store(
            config, packed, times, components.truncate, vocab, spec
        )
    return estimates | {run.name: estimate_run(config, packed, times, components, vocab)}


def show_plan(configs: list[ExperimentConfig], titles: list[str], at_once: float) -> None:
    """Print the estimates of runs and of their prerequisites, each once.

    titles: names to print. at_once: number of parallel runs.
    """
    silence_libraries()
    estimates: dict[str, Estimate] = {}
    names = {Plan.from_config(config).run.name: words for config, words in zip(configs, titles, strict=True)}
    for config in track(configs, "measuring steps"):
        estimates |= {name: measured for name, measured in estimate(config).items() if name not in estimates}
    done = sum(not config.force and Plan.from_config(config).run.result() is not None for config in configs)
    show(estimates, names, done, configs[0], at_once)

"""What runs will take, before any is begun: from their shapes, and from some steps of each, which are measured."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import Tensor

from kd.config.groups import RolloutConfig
from kd.config.schema import ExperimentConfig
from kd.data.batches import IGNORE, Batch, Packed, to_batch
from kd.data.tokenizer import vocabulary_size
from kd.experiment import stores
from kd.experiment.assembly import build_module
from kd.experiment.components import Components
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import check_tokenizers, prepare
from kd.models import causal_lm
from kd.models import flops as flops_module
from kd.models.causal_lm import CausalLM
from kd.models.flops import Cost
from kd.objective.chunked import Signal, fitting
from kd.objective.target import Target
from kd.parallel import collectives
from kd.rollout.strategies import Writers
from kd.runs.identity import part_of_outcome, size_text
from kd.store.writer import RowEncoder, takes
from kd.system import files
from kd.system.console import Terminal, clock, console, silence_libraries, track
from kd.system.hardware import capacity, hold_in, out_of_memory
from kd.system.processes import peak_memory
from kd.system.remote import home
from kd.system.signals import requests
from kd.teachers.base import Teacher, TeacherOrigin, Truncation
from kd.teachers.online import OnlineTeacher
from kd.training.module import Schedules
from kd.training.trainer import build_trainer

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


def sampled(config: ExperimentConfig) -> tuple[ExperimentConfig, float]:
    """Return a config with a sample of its text, which is packed in no time, and how many times as much it needs."""
    tokens = config.data.tokens or 0
    if tokens <= SAMPLE:
        return config, 1.0
    return config.derive(data={"tokens": SAMPLE}), tokens / SAMPLE


def of_run(config: ExperimentConfig, packed: Packed, times: float, components: Components, vocab: int) -> Estimate:
    """Of a run on `times` as many rows as are packed. Its teacher may be still to be made; its size tells as much.

    What is written is counted as long as it may be: models that have learned nothing do not end.
    """
    shape = {k: v for k, v in part_of_outcome(config.flat()).items() if not k.startswith(NO_SHAPE)}
    trainer, seq_len = config.trainer, config.data.seq_len
    shape |= {"accelerator": trainer.accelerator, "devices": trainer.devices, "strategy": trainer.strategy}
    key = json.dumps([shape, vocab, _alpha(components)], sort_keys=True)
    loaded = before_measuring()
    if key not in _measured:
        _measured[key] = _fitting(config, packed, components, vocab)
    step = _measured[key]
    student, teacher = step.costs["student"], step.costs.get("teacher")
    rows = trainer.steps * trainer.batch
    positions = rows * step.wider * seq_len
    beside = rows * seq_len if config.lm == "plain" else 0  # of plain text
    tokens = round(rows * step.wider * packed.counted) + beside
    planned = _teacher_by_cost(config, components, step.costs, vocab)
    once = 3 * student.flops_per_token + planned.flops_per_token(config.routing.name != "none")
    # All rows once by a teacher before training, or some of those of the steps.
    if config.rollout.by_teacher:
        written = len(packed.train) * times
    else:
        written = rows * components.rollout(None).writes / trainer.devices
    seconds = None
    if step.micro_batch is not None:
        parts = -(-trainer.batch // trainer.devices // step.rows)
        seconds = STARTS + trainer.steps * (parts * step.micro_batch + step.optimizer)
        # A validation is forward passes alone, of the student and, if there is one, of the teacher.
        looked = -(-trainer.steps // trainer.val_every) + config.is_pretrained
        looked = looked * packed.val[:, 1:].size / trainer.devices
        looked *= student.flops_per_token + (teacher.flops_per_token if teacher else 0)
        seconds += looked / once * step.micro_batch / (step.rows * step.wider * seq_len)
        seconds += written / step.rows * step.writing
        if packed.val_spans is not None:
            seconds += config.responses.samples * len(packed.val) / step.rows * step.answering
    flops = positions * once + beside * 3 * student.flops_per_token  # without those of writing
    learned = student.parameters + (teacher.parameters if teacher and planned.trainable else 0)
    memory = held(step.costs, config) + step.kept
    if collectives.device(trainer.accelerator).type == "cpu":
        memory += loaded
    disk, active = 4 * student.parameters, student.active_parameters
    return Estimate(tokens, seconds, disk, student.parameters, flops, memory, 24 * learned, active)


@cache
def before_measuring() -> int:
    """Bytes that libraries and data take in a process before it makes a model, as in a run."""
    return peak_memory()


def held(costs: dict[str, Cost], config: ExperimentConfig) -> int:
    """Bytes of weights, and of gradients and AdamW's two moments of what learns."""
    half = config.trainer.precision == "bf16"
    # A teacher that is loaded; beside language modelling alone for the validation.
    source = config.logits.source
    each = 16 if source.trains_teacher else 0 if source.reads_store else 2 if half else 4
    return 16 * costs["student"].parameters + (each * costs["teacher"].parameters if "teacher" in costs else 0)


def of_store(config: ExperimentConfig, packed: Packed, times: float, keep, vocab: int, described: dict) -> Estimate:
    """Of writing the store that a run reads, of `times` as many rows as are packed.

    Of an untrained teacher, which a nucleus keeps more of than of any.
    """
    trainer, seq_len = config.trainer, config.data.seq_len
    model = _teacher(config, vocab)
    encoder = RowEncoder.finished(OnlineTeacher(model), described, keep, trainer.accelerator)
    rows = len(packed.train) * times
    flops = rows * seq_len * flops_module.cost(model.model, seq_len).flops_per_token
    tokens, size, beside, seconds = takes(encoder, packed, trainer.micro_batch, rows)
    return Estimate(tokens, seconds, int(size) + beside, flops=flops)


def _teacher(config: ExperimentConfig, vocab: int) -> CausalLM:
    return causal_lm.build(config.teacher.size, config.teacher.name, vocab, config.data.seq_len, "teacher.name")


def _fitting(config: ExperimentConfig, *of) -> Step:
    """What is measured of as many rows at once as memory holds: a run halves them, too."""
    rows = min(config.trainer.micro_batch, config.trainer.batch)
    try:
        return _measure(config, *of)
    except Exception as error:
        if rows == 1 or not out_of_memory(error):
            raise
    return _fitting(config.derive(trainer={"micro_batch": rows // 2}), *of)


def _measure(config: ExperimentConfig, packed: Packed, components: Components, vocab: int) -> Step:
    """Measure some steps of the run's own module on one micro-batch; values of weights do not matter here."""
    costs = _costs(config, vocab)
    device = collectives.device(config.trainer.accelerator)
    if held(costs, config) > 0.9 * capacity(device):
        return Step(costs)
    seq_len = config.data.seq_len
    student = causal_lm.build(config.student.size, config.student.name, vocab, seq_len, "student.name").to(device)
    teacher = _planned_teacher(config, components, costs, vocab)
    batch, writing, answering = _written(config, packed, components, student, teacher)
    trainer, rollout = {"compile": False}, RolloutConfig("kd.rollout.strategies.none")  # compiling takes a minute
    planned = config.derive(trainer=trainer, rollout=rollout)
    module = build_module(planned, components, student, teacher, packed.end)
    alpha = _alpha(components)
    module.schedules = Schedules(lambda progress: alpha, lambda progress: 0.0)
    times = StepTimes()
    build_trainer(
        10**9, config.trainer.precision, config.trainer.accelerator, callbacks=[times]
    ).fit(module, repeat(batch))  # fmt: skip
    rows = min(config.trainer.micro_batch, config.trainer.batch)
    parts = -(-rows // module.micro_batch_size)  # more than one where memory ran out
    counted = int((batch.labels[: module.micro_batch_size] != IGNORE).sum())
    logits = min(counted, module.objective.chunk or fitting(student.head)) * vocab * 4 * ALIVE
    return Step(
        costs, min(rows, module.micro_batch_size), statistics.median(times.gradients) / parts,
        statistics.median(times.updates), kept=times.saved_bytes + logits, writing=writing, answering=answering,
        wider=len(batch.ids) // rows,
    )  # fmt: skip


def _alpha(components: Components) -> float:
    """Return 0 or 1 where alpha is at most that, so that a step leaves out a loss or its text, and 0.5 for the rest."""
    highest = max(components.alpha(step / 100) for step in range(101))
    return highest if highest in (0, 1) else 0.5


def _costs(config: ExperimentConfig, vocab: int) -> dict[str, Cost]:
    """Return the costs of student and teacher, from their shapes alone."""
    seq_len = config.data.seq_len
    return {
        role: flops_module.cost_of(model.size, model.name, vocab, seq_len, f"{role}.name")
        for role, model in (("student", config.student), ("teacher", config.teacher))
        if model.size or model.name
    }


def _teacher_by_cost(config: ExperimentConfig, components: Components, costs: dict[str, Cost], vocab: int) -> Teacher:
    """Return the teacher of a run without its model, and with a store that is not written."""
    store = UnwrittenStore(vocab, costs.get("teacher")) if config.logits.source.reads_store else None
    return components.logits(TeacherOrigin(cost=costs.get("teacher"), store=store))


def _planned_teacher(config: ExperimentConfig, components: Components, costs: dict[str, Cost], vocab: int) -> Teacher:
    """Return a teacher of the run's shape, with a model if its steps or its data need one."""
    teacher = _teacher_by_cost(config, components, costs, vocab)
    in_steps = teacher.distils and not config.logits.source.reads_store
    if not in_steps and not config.rollout.by_teacher:
        return teacher
    device = collectives.device(config.trainer.accelerator)
    teacher = components.logits(TeacherOrigin(_teacher(config, vocab).to(device), costs["teacher"]))
    if teacher.frozen and config.trainer.precision == "bf16":
        hold_in(torch.bfloat16, teacher.frozen)
    return teacher


def _written(
    config: ExperimentConfig, packed: Packed, components: Components, student: CausalLM, teacher: Teacher
) -> tuple[Batch, float, float]:  # fmt: skip
    """Return a micro-batch as a step gets it, and the seconds that the rollout and the student's responses take."""
    trainer, device = config.trainer, next(student.parameters()).device
    rows = packed.train[: min(trainer.micro_batch, trainer.batch)]
    spans = None if packed.train_spans is None else packed.train_spans[: len(rows)]
    data = to_batch(rows, np.arange(len(rows)), np.zeros(rows[:, 1:].shape, np.int64), spans, packed.boundary)
    batch = data = Batch(*(x.to(device) for x in data[:4]))
    writers = Writers(student, teacher.model, packed.end, 0)
    writing = answering = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=trainer.precision == "bf16"):
        if spans is not None:
            _, answering = _timed(device, lambda: writers.write(data, "student"))
        rollout = components.rollout(writers, **({"engine": "kd"} if "engine" in config.rollout.args else {}))
        if rollout.writes:
            batch, writing = _timed(device, lambda: rollout.write(data))
    plain = config.lm == "plain" or batch is not data  # language modelling is of other text then
    return (batch._replace(beside=data) if plain else batch), writing, answering


class UnwrittenStore:
    """Stand-in for a store that does not exist yet: one complete distribution for all positions."""

    def __init__(self, vocab: int, cost: Cost | None):
        self.vocab, self.cost = vocab, cost

    def select_window(self, window: tuple[float, float] | None) -> None:
        return None

    def signal(self, batch: Batch, mask: Tensor) -> Signal:
        logp = torch.linspace(0, 1, self.vocab, device=mask.device).sin().log_softmax(-1)
        label, seed = batch.labels[mask], batch.seed[mask]
        return lambda rows: Target(label[rows], logp.expand(len(label[rows]), -1), seed=seed[rows], whole=True)

    reference = signal

    def read(self, row_ids: np.ndarray, ids: np.ndarray) -> None:
        return None

    def truncation_for(self, requested: dict, function: Truncation) -> Truncation:
        return function


class StepTimes(Callback):
    """Seconds of gradients and of updates of at least three steps, and bytes that the backward pass keeps.

    The first step is not counted: memory is allocated in it.
    """

    def __init__(self) -> None:
        self.gradients: list[float] = []
        self.updates: list[float] = []
        self.saved_bytes = 0

    def on_train_start(self, trainer, module) -> None:
        requests.watch()  # Lightning has put handlers of its own in their place
        self._begun = _now(module.device)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._step_start = _now(module.device)
        if batch_idx == 0:
            self._watch_saved(module.student)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self._update_start = _now(module.device)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        end = _now(module.device)
        if batch_idx == 0:
            del module.student.hidden_states  # the method of the class again
            self._begun = end
            return
        self.gradients.append(self._update_start - self._step_start)
        self.updates.append(end - self._update_start)
        trainer.should_stop = len(self.gradients) >= 3 and end - self._begun >= PROBE

    def _watch_saved(self, student: CausalLM) -> None:
        """Count what the student's body keeps for its backward pass, in the largest micro-batch."""
        parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
        forward = student.hidden_states

        def hidden_states(ids: Tensor) -> Tensor:
            sizes: dict[int, int] = {}

            def save(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                hidden = forward(ids)
            self.saved_bytes = max(self.saved_bytes, sum(sizes.values()))
            return hidden

        student.__dict__["hidden_states"] = hidden_states  # in place of the method, for this model alone


def _timed(device: torch.device, work: Callable[[], Batch]) -> tuple[Batch, float]:
    start = _now(device)
    return work(), _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def show(made: dict[str, Estimate], names: dict[str, str], done: int, config: ExperimentConfig, at_once: float) -> None:
    """A line for each of `made` (name of its folder -> estimate), called as `names` say, and what all take together.

    config: of one of the runs, for where they run.
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
    root, device = home(config.root).resolve(), collectives.device(config.trainer.accelerator)
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    at_once = min(at_once, len(made))
    disk = sum(of.disk for of in made.values()) + at_once * max(of.beside for of in made.values())
    # Each GPU has one run, and a machine's memory all that run at once.
    memory = max(of.memory or 0 for of in made.values()) * (1 if device.type == "cuda" else at_once)
    free, says = shutil.disk_usage(there).free, f"{len(made)} to do{f', {done} done before' if done else ''}: "
    says += f"{sum(of.flops or 0 for of in made.values()):.1e} FLOPs"
    seconds = [of.seconds for of in made.values() if of.seconds]
    if len(seconds) == len(made):
        says += f", about {clock(sum(seconds))} one after another"
    says += f"; {files.amount(disk)} of disk at most, where {files.amount(free)} are free. Nothing was started."
    if config.data.is_instructions:
        says += " Responses that models write are taken to be as long as they may be, and count to the time alone."
    console.print(says, soft_wrap=True)
    for what, needed, has in (("memory", memory, capacity(device)), ("disk", disk, free)):
        if needed > has:
            text = f"That needs {files.amount(needed)} of {what}, and there are {files.amount(has)}."
            console.print(text, style="red", soft_wrap=True)


def estimate(config: ExperimentConfig) -> dict[str, Estimate]:
    """Return what a run takes, and before it its teacher and its store, by name; nothing of what is done."""
    run, teacher, start, place, record = Plan.of(config)
    if not config.force and run.result() is not None:
        return {}
    less, times = sampled(config)
    packed, components = prepare(less)
    check_tokenizers(config, components.tokenizer, config.teacher.name)
    vocab, stored = vocabulary_size(components.tokenizer), config.logits.source.reads_store
    exists = stored and place is not None and place.manifest().exists()
    first = record or teacher
    made = estimate(first) if first and not exists else {}
    made |= estimate(start) if start else {}
    if stored and place is not None and not exists and not record:
        spec = stores.described(config, packed)
        made[f"store {place.folder.name}"] = of_store(config, packed, times, components.keep, vocab, spec)
    return made | {run.name: of_run(config, packed, times, components, vocab)}


def show_plan(configs: list[ExperimentConfig], said: list[str], at_once: float) -> None:
    """Print what runs take, called as `said`, so many at once, and what is made first for them; each thing once."""
    silence_libraries()
    made: dict[str, Estimate] = {}
    names = {Plan.of(config).run.name: words for config, words in zip(configs, said, strict=True)}
    for config in track(configs, "measuring steps"):
        made |= {name: takes for name, takes in estimate(config).items() if name not in made}
    done = sum(not config.force and Plan.of(config).run.result() is not None for config in configs)
    show(made, names, done, configs[0], at_once)

"""Time and memory of a training step: some steps of a run's own module, on one micro-batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from kd.config.groups import RolloutConfig
from kd.config.schema import ExperimentConfig
from kd.data.batches import IGNORE, Batch, Packed, to_batch
from kd.experiment import starts
from kd.experiment.assembly import build_module
from kd.experiment.components import Components, over_run
from kd.experiment.prerequisites import full_name
from kd.models import adapters, causal_lm, weights
from kd.models import flops as flops_module
from kd.models.causal_lm import CausalLM
from kd.models.flops import Cost
from kd.objective.chunked import Signal, default_chunk_size
from kd.objective.target import Target
from kd.parallel import collectives
from kd.rollout.samplers import Samplers
from kd.system.hardware import capacity, out_of_memory
from kd.system.signals import requests
from kd.teachers.base import Teacher, TeacherOrigin, Truncation
from kd.training.module import Schedules
from kd.training.trainer import build_trainer

PROBE = 2.0  # seconds for a measurement, which has three steps at least
ALIVE = 6  # tensors as wide as a chunk's logits at one time: logits, two distributions and what becomes of them


class Step(NamedTuple):
    """Measurements of one shape; empty if its models do not fit into memory."""

    costs: dict[str, Cost]
    trainable: int  # weights of the student that learn
    rows: int = 1  # of a micro-batch
    micro_batch: float | None = None  # seconds
    optimizer: float = 0.0  # seconds
    saved_bytes: int = 0  # bytes, for the backward pass
    writing: float = 0.0  # seconds that a rollout takes for a micro-batch, whose responses never end
    answering: float = 0.0  # seconds that the student does
    wider: int = 1  # rows that a rollout makes of one


def held(costs: dict[str, Cost], trainable: int, config: ExperimentConfig) -> int:
    """Return the bytes of weights, and for those that learn also of gradients and AdamW's two moments.

    trainable: weights of the student that learn.
    """
    learned, student = 4 + moment_bytes(config), costs["student"].parameters
    teacher, source = costs.get("teacher"), config.logits.source
    size = 4 * student + learned * trainable
    if teacher and source.trains_teacher:
        size += (4 + learned) * teacher.parameters
    # A teacher that is loaded; beside language modelling alone for the validation.
    elif teacher and not source.reads_store and not _is_under_adapter(config):
        size += weights.held_bytes(teacher, config.teacher.dtype, config.trainer.precision)
    return size


def _is_under_adapter(config: ExperimentConfig) -> bool:
    """Return True if the teacher is the model under the student's adapter, which is in memory once."""
    teacher = config.teacher
    as_it_is = config.start.stage == "scratch" and not teacher.sft and not teacher.dtype and teacher.name
    adapted = not config.adapter.is_none and as_it_is
    return bool(adapted) and full_name(teacher.name) == full_name(config.student.name)


def moment_bytes(config: ExperimentConfig) -> int:
    """Return the bytes of the optimizer's two moments of a weight that learns."""
    return 2 if config.optim.name == "adamw8" else 8


def build_student_model(config: ExperimentConfig, vocab: int) -> CausalLM:
    """Return a model of the student's shape; its weights do not matter here."""
    if config.start.stage == "teacher":
        return CausalLM(AutoModelForCausalLM.from_config(starts.student_shape(config, vocab)), vocab)
    return causal_lm.build_model(config.student.size, config.student.name, vocab, config.data.seq_len, "student.name")


def build_teacher_model(config: ExperimentConfig, vocab: int) -> CausalLM:
    """Return a model of the teacher's shape, with weights of its dtype."""
    teacher, trainer = config.teacher, config.trainer
    model = causal_lm.build_model(teacher.size, teacher.name, vocab, config.data.seq_len, "teacher.name")
    if teacher.dtype:
        weights.hold(model, teacher.dtype, trainer.precision, collectives.device(trainer.accelerator))
    return model


def measure(config: ExperimentConfig, packed: Packed, components: Components, vocab: int) -> Step:
    """Return the measurements of a step with as many rows as fit into memory; as in a run, rows are halved."""
    rows = min(config.trainer.micro_batch, config.trainer.batch)
    try:
        return _measure(config, packed, components, vocab)
    except Exception as error:
        if rows == 1 or not out_of_memory(error):
            raise
    return measure(config.derive(trainer={"micro_batch": rows // 2}), packed, components, vocab)


def _measure(config: ExperimentConfig, packed: Packed, components: Components, vocab: int) -> Step:
    """Measure some steps of the run's own module on one micro-batch; values of weights do not matter here."""
    costs, trainable = _costs(config, vocab), _trainable(config, components, vocab)
    device = collectives.device(config.trainer.accelerator)
    if held(costs, trainable, config) > 0.9 * capacity(device):
        return Step(costs, trainable)
    student = build_student_model(config, vocab).to(device)
    components.adapter(student)
    teacher = _planned_teacher(config, components, costs, vocab)
    batch, writing, answering = _written(config, packed, components, student, teacher)
    trainer = {"compile": config.trainer.compile and "auto", "steps": 1}  # compiling models takes a minute
    planned = config.derive(trainer=trainer, rollout=RolloutConfig("kd.rollout.strategies.none"))
    module = build_module(planned, components, student, teacher, packed.eos_token_id)
    alpha = alpha_kind(components)
    module.schedules = Schedules(lambda progress: alpha, lambda progress: 0.0)
    times = StepTimes()
    build_trainer(
        10**9, config.trainer.precision, config.trainer.accelerator, callbacks=[times]
    ).fit(module, repeat(batch))  # fmt: skip
    rows = min(config.trainer.micro_batch, config.trainer.batch)
    parts = -(-rows // module.micro_batch_size)  # more than one where memory ran out
    counted = int((batch.labels[: module.micro_batch_size] != IGNORE).sum())
    logits = min(counted, module.objective.chunk or default_chunk_size(student.head)) * vocab * 4 * ALIVE
    return Step(
        costs, trainable, min(rows, module.micro_batch_size), statistics.median(times.gradients) / parts,
        statistics.median(times.updates), saved_bytes=times.saved_bytes + logits, writing=writing, answering=answering,
        wider=len(batch.ids) // rows,
    )  # fmt: skip


def alpha_kind(components: Components) -> float:
    """Return 0 or 1 if the highest alpha is that, since a step then omits a loss or its text; else 0.5."""
    highest = max(over_run(components.alpha))
    return highest if highest in (0, 1) else 0.5


def _costs(config: ExperimentConfig, vocab: int) -> dict[str, Cost]:
    """Return the costs of student and teacher, from their shapes alone."""
    teacher, seq_len = config.teacher, config.data.seq_len
    costs = {"student": flops_module.cost(_student_shape(config, vocab), seq_len)}
    if teacher.exists:
        costs["teacher"] = flops_module.cost_of(teacher.size, teacher.name, vocab, seq_len, "teacher.name")
    return costs


def _student_shape(config: ExperimentConfig, vocab: int) -> torch.nn.Module:
    """Return the Hugging Face model of a student on the device meta."""
    if config.start.stage == "teacher":
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(starts.student_shape(config, vocab))
    student = config.student
    return flops_module.shape_of(student.size, student.name, vocab, config.data.seq_len, "student.name")


def _trainable(config: ExperimentConfig, components: Components, vocab: int) -> int:
    """Return the number of weights of the student that learn, from its shape alone."""
    student = CausalLM(_student_shape(config, vocab), vocab)
    with torch.device("meta"):
        components.adapter(student)
    return adapters.trainable(student)


def teacher_by_cost(config: ExperimentConfig, components: Components, costs: dict[str, Cost], vocab: int) -> Teacher:
    """Return the teacher of a run without its model, and with a store that is not written."""
    store = UnwrittenStore(vocab, costs.get("teacher")) if config.logits.source.reads_store else None
    return components.logits(TeacherOrigin(cost=costs.get("teacher"), store=store))


def _planned_teacher(config: ExperimentConfig, components: Components, costs: dict[str, Cost], vocab: int) -> Teacher:
    """Return a teacher of the run's shape, with a model if its steps or its data need one."""
    teacher = teacher_by_cost(config, components, costs, vocab)
    in_steps = teacher.distils and not config.logits.source.reads_store
    if not in_steps and not config.rollout.by_teacher:
        return teacher
    device = collectives.device(config.trainer.accelerator)
    teacher = components.logits(TeacherOrigin(build_teacher_model(config, vocab).to(device), costs["teacher"]))
    if teacher.frozen:
        weights.hold(teacher.frozen, None, config.trainer.precision, device)
    return teacher


def _written(
    config: ExperimentConfig, packed: Packed, components: Components, student: CausalLM, teacher: Teacher
) -> tuple[Batch, float, float]:  # fmt: skip
    """Return a micro-batch as a step gets it, and the seconds that the rollout and the student's responses take."""
    trainer, device = config.trainer, next(student.parameters()).device
    rows = packed.train[: min(trainer.micro_batch, trainer.batch)]
    spans = None if packed.train_spans is None else packed.train_spans[: len(rows)]
    marks = None if packed.train_marks is None else packed.train_marks[: len(rows)]
    seed = np.zeros(rows[:, 1:].shape, np.int64)
    data = to_batch(rows, np.arange(len(rows)), seed, spans, packed.boundary, marks)
    batch = data = move_data_to_device(data, device)
    samplers = Samplers(student, teacher.model, packed.eos_token_id, 0)
    writing = answering = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=trainer.precision == "bf16"):
        if packed.val_spans is not None:
            prompts = data if spans is not None else _validation_rows(packed, len(rows), device)
            _, answering = _timed(device, lambda: samplers.write(prompts, "student"))
        rollout = components.rollout(samplers, **({"engine": "kd"} if "engine" in config.rollout.args else {}))
        if rollout.sampling_rate:
            batch, writing = _timed(device, lambda: rollout.write(data))
    plain = config.lm == "plain" or batch is not data  # language modelling is of other text then
    return (batch._replace(lm_batch=data) if plain else batch), writing, answering


def _validation_rows(packed: Packed, count: int, device: torch.device) -> Batch:
    """Return rows of one prompt each, for training data that has several in a row."""
    assert packed.val_spans is not None, "rows for validation have one prompt each"
    index = np.arange(count) % len(packed.val)
    rows = packed.val[index]
    batch = to_batch(rows, index, np.zeros(rows[:, 1:].shape, np.int64), packed.val_spans[index])
    return move_data_to_device(batch, device)


class UnwrittenStore:
    """Stand-in for a store that does not exist yet: one complete distribution for all positions."""

    def __init__(self, vocab: int, cost: Cost | None):
        self.vocab, self.cost = vocab, cost

    def select_window(self, window: tuple[float, float] | None) -> None:
        return None

    def signal(self, batch: Batch, mask: Tensor) -> Signal:
        logp = torch.linspace(0, 1, self.vocab, device=mask.device).sin().log_softmax(-1)
        label, seed = batch.labels[mask], batch.position_seeds[mask]
        return lambda rows: Target(label[rows], logp.expand(len(label[rows]), -1), seed=seed[rows], complete=True)

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
        """Count what the student's body keeps for its backward pass, in the largest micro-batch.

        Of layers that are computed again, it keeps the inputs, and the tensors of one layer at a time.
        """
        parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
        forward = student.hidden_states

        def hidden_states(*inputs: Tensor) -> Tensor:
            sizes: dict[int, int] = {}

            def save(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), _one_layer_kept(student):
                hidden = forward(*inputs)
            self.saved_bytes = max(self.saved_bytes, sum(sizes.values()))
            return hidden

        student.__dict__["hidden_states"] = hidden_states  # in place of the method, for this model alone


@contextmanager
def _one_layer_kept(model: CausalLM) -> Iterator[None]:
    """Let one of the layers that are computed again keep its tensors, as each does in its turn in the backward pass."""
    layers = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing)
    layer = next(layers, None)
    if layer is None:
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True


def _timed(device: torch.device, work: Callable[[], Batch]) -> tuple[Batch, float]:
    start = _now(device)
    return work(), _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

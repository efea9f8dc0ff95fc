"""Parts of a run, put together from its config: teacher, module, data and callbacks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from lightning.pytorch.callbacks import Callback

from kd.config.device_rules import check_shards
from kd.config.schema import ExperimentConfig
from kd.data.batches import Packed
from kd.data.datamodule import DistillationData
from kd.data.tokenizer import vocabulary_size
from kd.errors import check
from kd.evaluation import responses
from kd.evaluation.validation import Validation
from kd.experiment import stores, teacher_weights
from kd.experiment.compilation import Compiled, compiled_parts, training_flops
from kd.experiment.components import Components
from kd.experiment.dependencies import corpus, teacher_computation
from kd.experiment.prerequisites import Inputs, full_name
from kd.models import adapters, causal_lm, flops, weights
from kd.models.causal_lm import CausalLM
from kd.parallel import collectives, fsdp
from kd.rollout.samplers import Samplers
from kd.runs.export import export_step
from kd.runs.run import Run
from kd.system.compilation import keep_compiled_code
from kd.teachers.base import Teacher, TeacherOrigin
from kd.training.callbacks.checkpoints import Checkpoints
from kd.training.callbacks.logits_recorder import LogitsRecorder
from kd.training.callbacks.metric_log import MetricLog
from kd.training.callbacks.progress import ProgressBar
from kd.training.callbacks.step_selection import StepSelection
from kd.training.callbacks.throughput import Throughput
from kd.training.module import DistillationModule, Schedules


def build_teacher(config: ExperimentConfig, inputs: Inputs, student: CausalLM) -> Teacher:
    """Return the teacher of a run: its model is loaded, or begins from teacher.seed, unless a store stands for it.

    If it is the model under the student's adapter, both are on the same weights.
    """
    size, name = config.teacher.size, inputs.teacher
    if inputs.store or not (size or name):
        return inputs.components.logits(TeacherOrigin(store=inputs.store))
    vocab, seq_len = vocabulary_size(inputs.components.tokenizer), config.data.seq_len
    under_adapter = name and full_name(name) == inputs.first_weights(config) and adapters.is_adapted(student)
    if under_adapter and config.teacher.dtype is None:
        model = adapters.without_adapter(student)
    elif name and not config.logits.source.trains_teacher:
        model = teacher_weights.load(config, inputs.packed, vocab, name)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.teacher.seed)
            model = causal_lm.build_model(None if name else size, name, vocab, seq_len, "teacher.name")
    return inputs.components.logits(TeacherOrigin(model, flops.cost(model.model, seq_len)))


def build_module(
    config: ExperimentConfig, components: Components, student: CausalLM, teacher: Teacher, eos_token_id: int | None,
    sharded: tuple[str, ...] = (),
) -> DistillationModule:  # fmt: skip
    """Return the module that trains a student."""
    trainer = config.trainer
    truncation = teacher.truncation(config.truncation.spec, components.objective.truncation)
    rollout = None
    if not (config.rollout.is_none or config.rollout.by_teacher):  # what a teacher writes is in the data
        rollout = components.rollout(Samplers(student, teacher.model, eos_token_id, config.seed, trainer.micro_batch))
    if trainer.attention:
        for model in filter(None, (student, teacher.model)):
            model.set_attention(trainer.attention)
    if trainer.gradient_checkpointing:
        for model in filter(None, (student, teacher.model if teacher.trainable else None)):
            model.checkpoint_layers()
    whole_layers = not sharded and config.teacher.dtype != "nf4"  # which torch.compile can take
    compiled = _compiled(config, student, teacher, not whole_layers)
    if compiled != (False, False):
        keep_compiled_code()
    if compiled.models:
        for model in filter(None, (student, teacher.frozen)):
            model.compile_layers(required=trainer.compile is True)
    objective = replace(components.objective, truncation=truncation, compile=compiled.loss)
    return DistillationModule(
        student, teacher, objective, Schedules(components.alpha, components.lr),
        components.optim, max_steps=trainer.steps, micro_batch_size=trainer.micro_batch,
        grad_clip=trainer.clip, rollout=rollout, sharded=sharded,
        token_selection=None if config.routing.name == "none" else components.token_selection,
    )  # fmt: skip


def _compiled(config: ExperimentConfig, student: CausalLM, teacher: Teacher, sharded: bool) -> Compiled:
    """Return the parts of a run that are compiled. It depends on its config and device alone, so a resume is exact."""
    trainer, seq_len = config.trainer, config.data.seq_len
    student_flops = flops.cost(student.model, seq_len).flops_per_token
    teacher_flops = teacher.flops_per_token(config.routing.name != "none")
    total = training_flops(trainer, seq_len, student_flops, teacher_flops)
    return compiled_parts(trainer, collectives.device(trainer.accelerator).type, total, sharded)


def build_data(config: ExperimentConfig, inputs: Inputs, teacher: Teacher) -> DistillationData:
    """Return the batches of this rank. Lightning calls no hooks of a run without any, so that an evaluation has one."""
    trainer = config.trainer
    return DistillationData(
        inputs.packed, trainer.batch, config.seed, max(trainer.steps, 1), teacher_rows=teacher.rows,
        read_teacher=teacher.read, lm_data=inputs.plain, rank_slice=collectives.rank_slice(trainer.batch),
    )  # fmt: skip


class RunCallbacks(NamedTuple):
    """Callbacks of a run, in the order in which Lightning calls them."""

    checkpoints: Checkpoints
    recorder: LogitsRecorder | None
    throughput: Throughput
    metric_log: MetricLog
    validation: Validation
    selection: StepSelection
    progress: ProgressBar
    responses: responses.ResponseEvaluation | None

    def present(self) -> list[Callback]:
        """Return those that the run has."""
        return [callback for callback in self if callback is not None]


def build_callbacks(
    run: Run, config: ExperimentConfig, inputs: Inputs, module: DistillationModule, data: DistillationData, *,
    options: dict, code: dict, title: str, start: int,
) -> RunCallbacks:  # fmt: skip
    """Return what stands around the steps of a run that goes on at step `start`."""
    trainer, packed, teacher, sharded = config.trainer, inputs.packed, module.teacher, bool(module.sharded)
    recorder = None
    if config.record and not teacher.distils:
        recorder = stores.recorder(config, packed, inputs.components.truncate, module.student, start)
    saving = (recorder.flush, recorder.send) if recorder else (None, None)
    cost = flops.cost(module.student.model, config.data.seq_len)
    step_flops = flops.step_flops(cost, adapters.trainable(module.student))
    teacher_flops = teacher.flops_per_token(module.token_selection is not None)
    throughput = Throughput(cost.flops_per_token, step_flops, teacher_flops, trainer.log_every)
    rows, least = collectives.rank_slice(len(packed.val)), 0
    if sharded:  # as many batches on each rank
        least = -(-len(packed.val) // (trainer.micro_batch * collectives.world_size()))
    validation = Validation(
        trainer.val_every, teacher, data.validation_batches(trainer.micro_batch, rows, least), throughput.axes,
        packed.bytes_per_token, config.is_pretrained, packed.parts,
    )  # fmt: skip
    model, tokenizer = module.student.model, inputs.components.tokenizer
    save = partial(export_step, run, model=model, tokenizer=tokenizer, ends=row_ends(config, packed, tokenizer))
    return RunCallbacks(
        Checkpoints(run, trainer.checkpoint_every, options, code, *saving),
        LogitsRecorder(recorder) if recorder else None,
        throughput,
        MetricLog(trainer.log_every, throughput.axes),
        validation,
        StepSelection(validation, trainer.keep, trainer.patience, save),
        ProgressBar(title, trainer.steps, shown=collectives.rank() == 0),
        _responses(run, config, inputs, teacher, validation),
    )


def row_ends(config: ExperimentConfig, packed: Packed, tokenizer) -> list[int]:
    """Return the tokens that end a response or a text in the rows of a run; none where rows have no end."""
    if packed.eos_token_id is not None:
        ends = [packed.eos_token_id]
    else:
        ends = [] if corpus(config)[0].words else [tokenizer.eos_token_id]
    if config.lm == "plain":
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


def _responses(
    run: Run, config: ExperimentConfig, inputs: Inputs, teacher: Teacher, validation: Validation
) -> responses.ResponseEvaluation | None:
    """Return the evaluation of what models write to held-out prompts, where the data has prompts."""
    packed, sampling, trainer = inputs.packed, config.responses.to_dict(), config.trainer
    if packed.val_spans is None:
        return None
    responses_file = None
    if inputs.teacher:
        responses_file = responses.cache_path(
            config.root, packed, inputs.teacher, **sampling, precision=trainer.precision, **teacher_computation(config)
        )
    return responses.ResponseEvaluation(
        run.folder, packed, inputs.components.tokenizer, teacher, validation, responses_file, trainer.chunk, **sampling
    )


def sharded_roles(config: ExperimentConfig, student: CausalLM, teacher: Teacher) -> tuple[str, ...]:
    """Return which of student and teacher the ranks are to hold parts of."""
    trainer = config.trainer
    if collectives.world_size() == 1:
        return ()
    roles = ["student"] if trainer.strategy == "fsdp" else []
    shard_teacher = trainer.shard_teacher
    if teacher.trainable:
        shard_teacher = trainer.strategy == "fsdp"
    elif adapters.share_weights(student, teacher.model):
        why, hint = "the teacher is the model under the student's adapter", "leave trainer.shard_teacher out"
        check("trainer.shard_teacher", shard_teacher, not shard_teacher, f"no shards, as {why}", hint)
    elif teacher.model and shard_teacher is None:
        assert teacher.cost is not None, "a model comes with its cost"
        dtype = config.teacher.dtype
        size = weights.held_bytes(teacher.cost, dtype, trainer.precision)
        shard_teacher = not fsdp.fits_unsharded(size, collectives.device(trainer.accelerator))
        shard_teacher &= dtype not in weights.QUANTISED
        if shard_teacher:
            check_shards(trainer, f"The teacher is too large for one device of {trainer.ranks}")
    return (*roles, *(["teacher"] if teacher.model and shard_teacher else []))

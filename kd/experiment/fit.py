"""Training of one run in this process, alone or as one rank of several."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import lightning

from kd.config import plugins
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.data.datamodule import DistillationData
from kd.errors import UserError
from kd.evaluation import catalog
from kd.experiment import teacher_weights
from kd.experiment.assembly import (
    RunCallbacks,
    build_callbacks,
    build_data,
    build_module,
    build_teacher,
    row_ends,
    sharded_roles,
)
from kd.experiment.components import Components, build_functions
from kd.experiment.dependencies import plugged_in
from kd.experiment.prerequisites import Inputs
from kd.models import adapters, flops
from kd.parallel import collectives, fsdp
from kd.rollout import generate
from kd.runs import provenance
from kd.runs.export import environment, export
from kd.runs.identity import WandbMetadata, size_text, wandb_metadata
from kd.runs.loggers import views
from kd.runs.metrics_file import MetricsFile
from kd.runs.outcome import RunState, classify
from kd.runs.run import Run
from kd.runs.seal import ADAPTER
from kd.store.reader import Store
from kd.system import files
from kd.system.checkpoint_files import newest
from kd.system.console import console, silence_libraries
from kd.system.hardware import slowdown_in_bf16
from kd.system.processes import peak_memory
from kd.system.remote_checkpoints import step_of
from kd.system.signals import Preempted, requests
from kd.teachers.online import OnlineTeacher
from kd.training.module import DistillationModule
from kd.training.trainer import build_trainer


@dataclass(frozen=True)
class Assembly:
    """A run that is ready to train."""

    trainer: lightning.Trainer
    module: DistillationModule
    data: DistillationData
    callbacks: RunCallbacks
    loggers: list
    checkpoint: Path | None  # to go on with
    metadata: WandbMetadata
    options: dict  # the flat config
    code: dict
    student_cost: flops.Cost
    trainable: int  # weights of the student that learn


def fit(run: Run, config: ExperimentConfig, inputs: Inputs) -> dict:
    """Train, or go on with training, and write the result."""
    parts = assemble(run, config, inputs)
    trainer, module, name = parts.trainer, parts.module, parts.metadata.name
    first, seq_len = collectives.rank() == 0, config.data.seq_len
    if first:
        warn_of_bf16(config, trainer)
        if not config.is_evaluation:
            warn_of_large_batches(config, parts.data)
        if not config.adapter.is_none:
            count = size_text(parts.student_cost.parameters, None, parts.trainable)
            console.print(f"{name}: {count}, in an adapter.", soft_wrap=True)
    final = None  # until all of the run is done
    try:
        with requests.in_steps():
            trainer.fit(module, datamodule=parts.data, ckpt_path=parts.checkpoint)
        final, result = finish(run, config, inputs, parts)
        return result
    except BaseException as error:
        if isinstance(error, Preempted):
            error.place = f"at step {module.global_step} of {module.max_steps}"
        outcome = classify(error)
        path = run.end(outcome)
        if outcome.state == RunState.PREEMPTED and first:
            console.print(f"{name}: {outcome.reason}", soft_wrap=True)
        if outcome.state == RunState.DIVERGED:
            why = f"{error}. The run is not counted as a result; its report is in {path}"
            hint = "choose a lower lr.peak, or trainer.precision=fp32"
            raise UserError(option=name, why=why, hint=hint) from None
        if outcome.state == RunState.OUT_OF_MEMORY:
            raise UserError(
                option=name,
                why=f"ran out of memory at step {module.global_step}, with {module.micro_batch_size} rows at once: "
                f"{error}\nThe report of the run is in {path}",
                hint=f"type trainer.chunk={max(1, (module.objective.chunk or 256) // 2)} or "
                f"data.seq_len={seq_len // 2}, or choose a smaller model",
            ) from None
        raise
    finally:
        parts.callbacks.progress.stop()
        for logger in parts.loggers:
            logger.close(final)


def assemble(run: Run, config: ExperimentConfig, inputs: Inputs) -> Assembly:
    """Build what a run trains with."""
    silence_libraries()
    options, trainer = config.flat(), config.trainer
    code = source_code(config, inputs)
    lightning.seed_everything(config.seed, verbose=False)
    student = inputs.student(config)
    teacher = build_teacher(config, inputs, student)
    if inputs.packed.val_spans is not None:  # they respond to prompts when training has ended
        for model in filter(None, (student, teacher.model)):
            generate.check_cache(model)
    if setting := config.data.isolation:
        student.check_isolation("student", setting)
        if teacher.model:
            teacher.model.check_isolation("teacher", setting)
    sharded = sharded_roles(config, student, teacher)
    run.start(config)
    checkpoint = latest_checkpoint(run, "student" in sharded)
    start = step_of(checkpoint.name) if checkpoint else 0
    student_cost = flops.cost(student.model, config.data.seq_len)
    sizes = {role: cost[:2] for role, cost in (("student", student_cost), ("teacher", teacher.cost)) if cost}
    metadata = wandb_metadata(run.name, options, sizes, code["environment"]["git"])
    loggers = []
    if collectives.rank() == 0:
        loggers.append(MetricsFile(run / "metrics.jsonl", start))
        loggers += views(inputs.components.logger, run.folder, metadata)
    module = build_module(config, inputs.components, student, teacher, inputs.packed.eos_token_id, sharded)
    data = build_data(config, inputs, teacher)
    callbacks = build_callbacks(
        run, config, inputs, module, data, options=options, code=code, title=metadata.name, start=start
    )
    lightning_trainer = build_trainer(
        max(trainer.steps, 1), trainer.precision, trainer.accelerator, trainer.devices, "student" in sharded,
        callbacks.present(), loggers, run.folder,
    )  # fmt: skip
    return Assembly(
        lightning_trainer, module, data, callbacks, loggers, checkpoint, metadata, options, code, student_cost,
        adapters.trainable(student),
    )  # fmt: skip


def source_code(config: ExperimentConfig, inputs: Inputs) -> dict:
    """Return the record of the code in a result. It is taken before training, since files can be edited meanwhile."""
    code: dict = {
        "environment": environment(), "sources": provenance.sources(config.flat()), "origins": inputs.origins,
    }  # fmt: skip
    measures = [metric.function for metric in catalog.metrics()]
    if plugged := plugins.used([*plugged_in(config), *measures]):
        code["plugins"] = [plugin.to_dict() for plugin in plugged]
    for group, rows in (("data", inputs.packed), ("plain", inputs.plain)):
        if rows and group in code["sources"] and (packed_by := packing.code_of(rows.folder)):
            code["sources"][group] = packed_by
    return code


def latest_checkpoint(run: Run, sharded: bool) -> Path | None:
    """Return the newest complete checkpoint. Raises UserError if it is in shards and the run is not, or vice versa."""
    checkpoint = collectives.all_gather(newest(run / "checkpoints") if collectives.rank() == 0 else None)[0]
    if checkpoint and checkpoint.is_dir() != sharded:
        raise UserError(
            option=checkpoint,
            why=f"was saved {'in shards' if checkpoint.is_dir() else 'whole'}",
            hint=f"continue with trainer.strategy={'fsdp' if checkpoint.is_dir() else 'ddp'}, or, to train anew, type",
            commands=[run.removal_command("checkpoints")],
        )
    return checkpoint


def warn_of_bf16(config: ExperimentConfig, trainer: lightning.Trainer) -> None:
    """Print a warning where bf16 is slower than fp32."""
    bf16 = config.trainer.precision == "bf16"
    if bf16 and (slowdown := slowdown_in_bf16(trainer.strategy.root_device)) > 1.5:
        console.print(f"This processor has no arithmetic for bf16: a product takes {slowdown:.0f} times as long as in "
                      "fp32. trainer.precision=fp32 is faster here.", soft_wrap=True)  # fmt: skip


def warn_of_large_batches(config: ExperimentConfig, data: DistillationData) -> None:
    """Print a warning where a step reads rows more than once."""
    batch = config.trainer.batch
    for text, rows in (("data", data.train_rows), ("plain text", len(data.lm_data.train) if data.lm_data else batch)):
        if batch > rows:
            console.print(f"A batch of {batch:,} rows is larger than the {text}, of {rows:,} rows: each step "
                          f"reads some of them more than once. Type trainer.batch={rows}, or take more text.",
                          soft_wrap=True)  # fmt: skip


def finish(run: Run, config: ExperimentConfig, inputs: Inputs, parts: Assembly) -> tuple[dict | None, dict]:
    """Write the trained student and the result. Return final metrics and result; None and {} on other ranks."""
    memory = max(collectives.all_gather(peak_memory()))
    student, tokenizer = parts.module.student, inputs.components.tokenizer
    exported = not config.is_evaluation
    weights = fsdp.full_state_dict(student) if exported and "student" in parts.module.sharded else None
    if collectives.rank() != 0:
        return None, {}
    result = result_of(run, config, inputs, parts, memory)
    if parts.callbacks.recorder:
        device = parts.trainer.strategy.root_device
        student.to(device)  # Lightning has moved it to the CPU
        trainer = config.trainer
        parts.callbacks.recorder.recorder.finish(
            OnlineTeacher(student), device, inputs.packed.val, trainer.micro_batch, trainer.steps,
            inputs.packed.val_marks,
        )  # fmt: skip
    if weights:
        student = inputs.student(config)
        student.load_state_dict(weights)
    if exported and config.adapter.export == "both":
        with files.atomic(run / ADAPTER) as temporary:
            adapters.save(student, temporary, inputs.first_weights(config))
    if exported:
        adapters.merge(student)
        export(run, student.model, tokenizer, row_ends(config, inputs.packed, tokenizer), config, result)
    return parts.callbacks.validation.metrics, run.finish(result)


def result_of(run: Run, config: ExperimentConfig, inputs: Inputs, parts: Assembly, memory: int) -> dict:
    """Return the content of result.json. memory: peak of any rank, in bytes."""
    packed, throughput, validation = inputs.packed, parts.callbacks.throughput, parts.callbacks.validation
    student, teacher = parts.student_cost, parts.module.teacher.cost
    return {
        "state": "done", "run": run.name, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "config": parts.options,
        **parts.code, "parameters": student.parameters, "non_embedding": student.non_embedding,
        "active_parameters": student.active_parameters, "trainable_parameters": parts.trainable,
        "flops_per_token": student.flops_per_token,
        **{f"teacher_{name}": getattr(teacher, name, None) for name in flops.Cost._fields},
        "teacher_weights": teacher_weights.losses(config, packed, inputs.teacher),
        "train_rows": parts.data.train_rows, "data": packed.counts, "entropy": packed.entropy,
        **({"parts": [part._asdict() for part in packed.parts]} if packed.parts else {}),
        "bytes_per_token": packed.bytes_per_token, "tokens": throughput.tokens, "flops": throughput.flops,
        "seconds": round(throughput.seconds, 2), "peak_memory": memory,
        "micro_batch": parts.module.micro_batch_size, "performance": throughput.rates(),
        "step": validation.step, "steps": parts.trainer.global_step,
        "initial": validation.initial or None,
        "final": validation.metrics,
    }  # fmt: skip


def as_job(run: Run, inputs: Inputs) -> dict:
    """Return the inputs of rank 0 as plain containers, for from_job() of the other ranks."""
    store, plain = inputs.store, inputs.plain
    return {
        "run": run.name, "data": str(inputs.packed.folder), "teacher": inputs.teacher,
        "start": inputs.start, "plain": str(plain.folder) if plain else None, "origins": inputs.origins,
        "store": [store.path, str(store.cache)] if store else None,
    }  # fmt: skip


def from_job(job: dict, config: ExperimentConfig) -> Inputs:
    """Return the inputs of a rank other than 0, which has made data, teacher and store."""
    packed = packing.open_packed(Path(job["data"]))
    store = Store(job["store"][0], Path(job["store"][1])) if job["store"] else None
    plain = packing.open_packed(Path(job["plain"])) if job["plain"] else None
    components = Components(config, packed, build_functions(config))
    return Inputs(packed, components, job["teacher"], job["start"], store, plain, job["origins"])

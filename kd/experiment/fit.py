"""Training of one run in this process, alone or as one rank of several."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import lightning
import torch

from kd.config import components as conf
from kd.config.rules import check_shards
from kd.config.schema import ExperimentConfig
from kd.data import packing
from kd.data.batches import Batches, Packed, ValidationBatches
from kd.data.tokenizer import vocabulary_size
from kd.errors import UserError
from kd.evaluation import responses
from kd.experiment import stores
from kd.experiment.components import Components
from kd.experiment.dependencies import corpus
from kd.experiment.prerequisites import Inputs
from kd.models import causal_lm, flops
from kd.models.causal_lm import Causal
from kd.parallel import collectives, ddp, fsdp
from kd.rollout import generate, strategies
from kd.runs import provenance
from kd.runs.export import environment, export
from kd.runs.identity import about
from kd.runs.loggers import MetricsFile, Performance, views
from kd.runs.run import DIVERGED, PREEMPTED, Run
from kd.store.reader import Store
from kd.system.checkpoint_files import DigestIO, newest
from kd.system.console import Steps, console, silence_libraries
from kd.system.hardware import out_of_memory, slowdown_in_bf16
from kd.system.processes import peak_memory
from kd.system.signals import Preempted, requests
from kd.teachers import sources
from kd.training.checkpoints import Checkpoints
from kd.training.module import Distillation, NonFinite


def fit(run: Run, config: ExperimentConfig, inputs: Inputs) -> dict:
    """Train, or go on with training, and write the result."""
    silence_libraries()
    packed, components = inputs.packed, inputs.components
    options, flat = config.trainer, config.flat()
    code = {"environment": environment(), "sources": provenance.sources(flat)}  # before anybody edits it
    code["origins"] = inputs.origins
    for group, rows in (("data", packed), ("plain", inputs.plain)):
        if rows and group in code["sources"] and (kept := packing.code_of(rows.folder)):
            code["sources"][group] = kept
    lightning.seed_everything(config.seed, verbose=False)
    seq_len, vocab = config.data.seq_len, vocabulary_size(components.tokenizer)
    student, teacher_name, store = inputs.student(config), inputs.teacher, inputs.store
    costs = {"student": flops.cost(student.model, seq_len)}
    source, teacher, among, objective = config.logits.source, None, None, components.objective
    if store:
        costs["teacher"] = flops.Cost(**store.manifest["cost"])
        among = store.pick(sources.share(config.logits.window))
        truncation = store.as_asked(config.truncation.spec, objective.truncation)
        objective = replace(objective, truncation=truncation)
    elif teacher_name or source.trains_teacher:
        size = None if teacher_name else config.teacher.size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.teacher.seed)
            teacher = causal_lm.build(size, teacher_name, vocab, seq_len, "teacher.name")
        costs["teacher"] = flops.cost(teacher.model, seq_len)
    if packed.val_spans is not None:  # they respond to prompts when training has ended
        for model in filter(None, (student, teacher)):
            generate.check_cache(model)
    sharded = in_shards(config, costs, teacher)
    run.begin(config)
    checkpoint = collectives.gather(newest(run / "checkpoints") if collectives.number() == 0 else None)[0]
    if checkpoint and checkpoint.is_dir() != ("student" in sharded):
        raise UserError(
            f"{checkpoint} was saved {'in shards' if checkpoint.is_dir() else 'whole'}: go on with trainer.strategy="
            f"{'fsdp' if checkpoint.is_dir() else 'ddp'}, or, to train anew, type:\n  {run.removal('checkpoints')}"
        )
    start = int(checkpoint.stem.partition("-")[2]) if checkpoint else 0
    git = code["environment"]["git"]
    told = about(run.name, flat, {role: cost[:2] for role, cost in costs.items()}, git)
    first = collectives.number() == 0
    loggers = [MetricsFile(run / "metrics.jsonl", start)] if first else []
    loggers += views(components.logger, run.folder, told) if first else []
    progress = Steps(told.name, options.steps, start, shown=first)
    passes = -(-len(packed.val) // (options.micro_batch * collectives.count())) if sharded else 0
    validation = ValidationBatches(
        packed.val,
        options.micro_batch,
        collectives.share(len(packed.val)),
        passes,
        packed.val_spans,
        packed.boundary,
    )
    recorder = None
    if config.record and not source.distils:
        recorder = stores.recorder(config, packed, components.keep, student, start)
    writers = strategies.Writers(student, teacher, packed.end, config.seed, options.micro_batch)
    module = Distillation(
        student, teacher, components.logits(store or teacher), objective,
        components.alpha, components.lr, components.optim,
        steps=options.steps, micro_batch=options.micro_batch, clip=options.clip, log_every=options.log_every,
        val_every=options.val_every, validation=validation,
        flops=flops.step_flops(source, flat["routing"] != "none", costs["student"], costs.get("teacher")),
        bytes_per_token=packed.bytes_per_token, watch=progress.update,
        reference=store.reference if store else sources.online(teacher) if teacher else None,
        learns=source.trains_teacher,
        recorder=recorder, sharded=sharded, route=components.route,
        rollout=None if config.rollout.is_none or config.rollout.by_teacher else components.rollout(writers),
        validates_first=config.is_pretrained,
    )  # fmt: skip
    if options.compile:
        for model in (student, *module.outside):
            model.compile_layers()
    processes = ddp.lightning_arguments(options.devices, "student" in sharded)
    processes["plugins"] = [DigestIO(), *processes["plugins"]]
    callbacks = [Checkpoints(run, options.checkpoint_every, flat, code), Performance(options.log_every)]
    if packed.val_spans is not None:
        sampling = config.responses.to_dict()
        kept = inputs.teacher and responses.kept(
            config.root, packed, inputs.teacher, **sampling, precision=options.precision
        )
        callbacks.append(responses.Responses(run.folder, packed, components.tokenizer, kept, options.chunk, **sampling))
    trainer = lightning.Trainer(
        accelerator=options.accelerator, **processes, precision=conf.PRECISIONS[options.precision],
        max_steps=options.steps, max_epochs=-1, logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=run.folder,
    )  # fmt: skip
    if first and options.precision == "bf16" and (slowdown := slowdown_in_bf16(trainer.strategy.root_device)) > 1.5:
        console.print(f"This processor has no arithmetic for bf16: a product takes {slowdown:.0f} times as long as in "
                      "fp32. trainer.precision=fp32 is faster here.", soft_wrap=True)  # fmt: skip
    rows = len(packed.train if among is None else among)
    for text, there in (
        ("data", rows),
        ("plain text", len(inputs.plain.train) if inputs.plain else options.batch),
    ):
        if first and options.batch > there:
            console.print(f"A batch of {options.batch:,} rows is larger than the {text}, of {there:,} rows: each step "
                          f"reads some of them more than once. Type trainer.batch={there}, or take more text.",
                          soft_wrap=True)  # fmt: skip
    final = None  # until all of the run is done
    try:
        order = options.batch, config.seed, start, options.steps
        mine = collectives.share(options.batch)
        plain = inputs.plain
        beside = Batches(plain.train, *order, part=mine, boundary=plain.boundary) if plain else None
        batches = Batches(
            packed.train,
            *order,
            among,
            store.read if store else None,
            mine,
            packed.train_spans,
            beside,
            packed.boundary,
        )
        with requests.in_steps():
            trainer.fit(module, batches, ckpt_path=checkpoint)
        memory = max(collectives.gather(peak_memory()))
        weights = fsdp.weights(student) if "student" in sharded else None
        if not first:
            return {}
        result = {
            "state": "done", "run": run.name, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "config": flat, **code,
            "parameters": costs["student"].parameters, "non_embedding": costs["student"].non_embedding,
            "active_parameters": costs["student"].active_parameters,
            "flops_per_token": costs["student"].flops_per_token,
            **{f"teacher_{k}": getattr(costs.get("teacher"), k, None) for k in flops.Cost._fields},
            "train_rows": rows, "data": packed.counts,
            "entropy": packed.entropy, "bytes_per_token": packed.bytes_per_token,
            "tokens": module.tokens, "flops": module.flops, "seconds": round(module.seconds, 2),
            "peak_memory": memory, "micro_batch": module.micro_batch, "initial": module.initial_metrics or None,
            "final": module.val_metrics,
        }  # fmt: skip
        if recorder:
            student.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            recorder.finish(student, packed.val, options.micro_batch, options.steps)
        if weights:
            student = inputs.student(config)
            student.load_state_dict(weights)
        export(run, student.model, components.tokenizer, row_ends(config, packed, components.tokenizer), config, result)
        result = run.finish(result)
        final = module.val_metrics
        return result
    except NonFinite as error:
        path = run.end(DIVERGED, str(error), exit_code=2, **error.report)
        raise UserError(f"{told.name}: {error}. Not counted as a result; what is known of it is in {path}.") from None
    except Preempted as error:
        reason = f"asked to end at step {module.global_step} of {options.steps}; the same command goes on with it"
        run.end(PREEMPTED, reason, exit_code=error.code)
        if first:
            console.print(f"{told.name}: {reason}", soft_wrap=True)
        raise
    except BaseException as error:
        full = isinstance(error, Exception) and out_of_memory(error)
        path = run.failed(error, told=full)
        if full:
            raise UserError(
                f"{told.name} ran out of memory at step {module.global_step}, with {module.micro_batch} rows at once: "
                f"{error}\nTake trainer.chunk={max(1, (components.objective.chunk or 256) // 2)}, a smaller model, or "
                f"data.seq_len={seq_len // 2}. What is known of it is in {path}."
            ) from None
        raise
    finally:
        progress.stop()
        for logger in loggers:
            logger.close(final)


def row_ends(config: ExperimentConfig, packed: Packed, tokenizer) -> list[int]:
    """Return the tokens that end a response or a text in the rows of a run; none where rows have no end."""
    ends = [packed.end]
    if packed.end is None:
        ends = [] if corpus(config)[0].words else [tokenizer.eos_token_id]
    if config.lm == "plain":
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


def in_shards(config: ExperimentConfig, costs: dict[str, flops.Cost], teacher: Causal | None) -> tuple[str, ...]:
    """Which of student and teacher the ranks are to hold parts of."""
    trainer = config.trainer
    if collectives.count() == 1:
        return ()
    roles = ["student"] if trainer.strategy == "fsdp" else []
    shard_teacher = trainer.shard_teacher
    if config.logits.source.trains_teacher:
        shard_teacher = trainer.strategy == "fsdp"
    elif teacher and shard_teacher is None:
        size = 2 if trainer.precision == "bf16" else 4
        shard_teacher = not fsdp.fits(costs["teacher"].parameters, size, collectives.device(trainer.accelerator))
        if shard_teacher:
            check_shards(trainer, f"The teacher is too large for one device of {trainer.devices}")
    return (*roles, *(["teacher"] if teacher and shard_teacher else []))


def as_job(run: Run, config: ExperimentConfig, inputs: Inputs) -> dict:
    """Return what each rank of a run needs, as plain containers; from_job() reads it."""
    store, plain = inputs.store, inputs.plain
    return {
        "config": config.to_dict(), "run": run.name, "data": str(inputs.packed.folder), "teacher": inputs.teacher,
        "start": inputs.start, "plain": str(plain.folder) if plain else None, "origins": inputs.origins,
        "store": [store.path, str(store.cache)] if store else None,
    }  # fmt: skip


def from_job(job: dict, config: ExperimentConfig) -> Inputs:
    """Return the inputs of a rank: data, teacher and store exist already."""
    packed = packing.opened(Path(job["data"]))
    store = Store(job["store"][0], Path(job["store"][1])) if job["store"] else None
    plain = packing.opened(Path(job["plain"])) if job["plain"] else None
    components = Components(config, packed)
    return Inputs(packed, components, job["teacher"], job["start"], store, plain, job["origins"])

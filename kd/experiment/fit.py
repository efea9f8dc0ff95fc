"""Training of one run in this process, alone or as one rank of several."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import lightning
import torch

from kd.config import components as conf
from kd.config.rules import Settings, check_shards, is_pretrained, kept_of, name_of, source_of
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


def fit(run: Run, settings: Settings, inputs: Inputs) -> dict:
    """Train, or go on with training, and write the result."""
    silence_libraries()
    packed, components = inputs.packed, inputs.components
    of, flat = settings["trainer"], conf.flat(settings)
    code = {"environment": environment(), "sources": provenance.sources(flat)}  # before anybody edits it
    code["origins"] = inputs.origins
    for group, rows in (("data", packed), ("plain", inputs.plain)):
        if rows and group in code["sources"] and (kept := packing.code_of(rows.folder)):
            code["sources"][group] = kept
    lightning.seed_everything(settings["seed"], verbose=False)
    seq_len, vocab = settings["data"]["seq_len"], vocabulary_size(components.tokenizer)
    student, teacher_name, store = inputs.student(settings), inputs.teacher, inputs.store
    costs = {"student": flops.cost(student.model, seq_len)}
    how, teacher, among, objective = source_of(settings), None, None, components.objective
    if store:
        costs["teacher"] = flops.Cost(**store.manifest["cost"])
        among = store.pick(sources.share(settings["logits"]["window"]))
        asked = store.as_asked(kept_of(settings["truncation"]), objective.truncation)
        objective = replace(objective, truncation=asked)
    elif teacher_name or how == "cotrained":
        size = None if teacher_name else settings["teacher"]["size"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["teacher"]["seed"])
            teacher = causal_lm.build(size, teacher_name, vocab, seq_len, "teacher.name")
        costs["teacher"] = flops.cost(teacher.model, seq_len)
    if packed.val_spans is not None:  # they respond to prompts when training has ended
        for model in filter(None, (student, teacher)):
            generate.check_cache(model)
    sharded = in_shards(settings, costs, teacher)
    run.begin(settings)
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
    progress = Steps(told.name, of["steps"], start, shown=first)
    passes = -(-len(packed.val) // (of["micro_batch"] * collectives.count())) if sharded else 0
    validation = ValidationBatches(
        packed.val, of["micro_batch"], collectives.share(len(packed.val)), passes, packed.val_spans, packed.boundary
    )
    recorder = None
    if how == "none" and settings["record"]:
        recorder = stores.recorder(settings, packed, components.keep, student, start)
    writers = strategies.Writers(student, teacher, packed.end, settings["seed"], of["micro_batch"])
    module = Distillation(
        student, teacher, components.logits(store or teacher), objective,
        components.alpha, components.lr, components.optim,
        steps=of["steps"], micro_batch=of["micro_batch"], clip=of["clip"], log_every=of["log_every"],
        val_every=of["val_every"], validation=validation,
        flops=flops.step_flops(how, flat["routing"] != "none", costs["student"], costs.get("teacher")),
        bytes_per_token=packed.bytes_per_token, watch=progress.update,
        reference=store.reference if store else sources.online(teacher) if teacher else None, learns=how == "cotrained",
        recorder=recorder, sharded=sharded, route=components.route,
        rollout=None if name_of(settings["rollout"]) in ("none", "teacher") else components.rollout(writers),
        validates_first=is_pretrained(settings),
    )  # fmt: skip
    if of["compile"]:
        for model in (student, *module.outside):
            model.compile_layers()
    processes = ddp.lightning_arguments(of["devices"], "student" in sharded)
    processes["plugins"] = [DigestIO(), *processes["plugins"]]
    callbacks = [Checkpoints(run, of["checkpoint_every"], flat, code), Performance(of["log_every"])]
    if packed.val_spans is not None:
        asked = settings["responses"]
        kept = inputs.teacher and responses.kept(
            settings["root"], packed, inputs.teacher, **asked, precision=of["precision"]
        )
        callbacks.append(responses.Responses(run.folder, packed, components.tokenizer, kept, of["chunk"], **asked))
    trainer = lightning.Trainer(
        accelerator=of["accelerator"], **processes, precision=conf.PRECISIONS[of["precision"]],
        max_steps=of["steps"], max_epochs=-1, logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=run.folder,
    )  # fmt: skip
    if first and of["precision"] == "bf16" and (slowdown := slowdown_in_bf16(trainer.strategy.root_device)) > 1.5:
        console.print(f"This processor has no arithmetic for bf16: a product takes {slowdown:.0f} times as long as in "
                      "fp32. trainer.precision=fp32 is faster here.", soft_wrap=True)  # fmt: skip
    rows = len(packed.train if among is None else among)
    for text, there in (("data", rows), ("plain text", len(inputs.plain.train) if inputs.plain else of["batch"])):
        if first and of["batch"] > there:
            console.print(f"A batch of {of['batch']:,} rows is larger than the {text}, of {there:,} rows: each step "
                          f"reads some of them more than once. Type trainer.batch={there}, or take more text.",
                          soft_wrap=True)  # fmt: skip
    final = None  # until all of the run is done
    try:
        order = of["batch"], settings["seed"], start, of["steps"]
        mine = collectives.share(of["batch"])
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
            recorder.finish(student, packed.val, of["micro_batch"], of["steps"])
        if weights:
            student = inputs.student(settings)
            student.load_state_dict(weights)
        export(
            run, student.model, components.tokenizer, row_ends(settings, packed, components.tokenizer), settings, result
        )
        result = run.finish(result)
        final = module.val_metrics
        return result
    except NonFinite as error:
        path = run.end(DIVERGED, str(error), exit_code=2, **error.report)
        raise UserError(f"{told.name}: {error}. Not counted as a result; what is known of it is in {path}.") from None
    except Preempted as error:
        reason = f"asked to end at step {module.global_step} of {of['steps']}; the same command goes on with it"
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


def row_ends(settings: Settings, packed: Packed, tokenizer) -> list[int]:
    """Return the tokens that end a response or a text in the rows of a run; none where rows have no end."""
    ends = [packed.end]
    if packed.end is None:
        ends = [] if corpus(settings)[0].words else [tokenizer.eos_token_id]
    if settings["lm"] == "plain":
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


def in_shards(settings: Settings, costs: dict[str, flops.Cost], teacher: Causal | None) -> tuple[str, ...]:
    """Which of student and teacher the ranks are to hold parts of."""
    of = settings["trainer"]
    if collectives.count() == 1:
        return ()
    roles = ["student"] if of["strategy"] == "fsdp" else []
    asked = of["shard_teacher"]
    if source_of(settings) == "cotrained":
        asked = of["strategy"] == "fsdp"
    elif teacher and asked is None:
        size = 2 if of["precision"] == "bf16" else 4
        asked = not fsdp.fits(costs["teacher"].parameters, size, collectives.device(of["accelerator"]))
        if asked:
            check_shards(of, f"The teacher is too large for one device of {of['devices']}")
    return (*roles, *(["teacher"] if teacher and asked else []))


def as_job(run: Run, settings: Settings, inputs: Inputs) -> dict:
    """Return what each rank of a run needs, as plain containers; from_job() reads it."""
    store, plain = inputs.store, inputs.plain
    return {
        "settings": settings, "run": run.name, "data": str(inputs.packed.folder), "teacher": inputs.teacher,
        "start": inputs.start, "plain": str(plain.folder) if plain else None, "origins": inputs.origins,
        "store": [store.path, str(store.cache)] if store else None,
    }  # fmt: skip


def from_job(job: dict) -> Inputs:
    """Return the inputs of a rank: data, teacher and store exist already."""
    packed = packing.opened(Path(job["data"]))
    store = Store(job["store"][0], Path(job["store"][1])) if job["store"] else None
    plain = packing.opened(Path(job["plain"])) if job["plain"] else None
    components = Components(job["settings"], packed)
    return Inputs(packed, components, job["teacher"], job["start"], store, plain, job["origins"])

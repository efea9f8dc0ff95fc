"""From a config to a result: the wiring, and the only file that sees the config.

python train.py                                   one run with the defaults
python train.py loss=akl student=1m               another one
python train.py sweeps=demo                       many
python train.py --help                            the axes and their options
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kd.system.launchers import forget_ranks
from kd.system.signals import Preempted, end_with_parent, requests

if __name__ == "__main__":  # before anything is loaded that takes its time, or reads a rank
    requests.watch()
    forget_ranks(os.environ)

# Before torch is loaded: its threads are to sleep while they wait, not to spin, or runs that share cores slow each
# other down by far more than their share.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from kd.config import components as conf
from kd.config import security
from kd.config.rules import (
    Settings,
    check_prompts_only,
    check_shards,
    is_pretrained,
    kept_of,
    name_of,
    resolve,
    source_of,
)
from kd.data import packing
from kd.data.batches import Batches, Packed, ValidationBatches
from kd.data.tokenizer import load_tokenizer, vocabulary_size
from kd.errors import MISTAKES, UserError, for_people
from kd.experiment.dependencies import corpus, plain_corpus, plan, recording
from kd.experiment.summary import show
from kd.launch import hydra_plugins
from kd.runs import provenance, wandb_agent
from kd.runs.export import environment, export
from kd.runs.identity import about
from kd.runs.run import DIVERGED, PREEMPTED, SEALED, Run, check_student
from kd.system import files
from kd.system.console import Steps, console, end_with, track
from kd.system.processes import peak_memory
from kd.system.remote import home

if TYPE_CHECKING:
    from kd.experiment.planner import Estimate
    from kd.launch import rank_launcher
    from kd.models import flops
    from kd.models.causal_lm import Causal
    from kd.store.reader import Store


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    requests.watch()
    try:
        settings = resolve(cfg, HydraConfig.get().overrides.task)
        if settings["plan"]:
            return show_plan([settings], ["this run"], 1)
        run, result, before = shown(settings)
        wandb_agent.tell(run, settings, result)
        notes = [provenance.done_before(result), *provenance.doubts(result)] if before else []
        show(run, result, [f"{note[0].upper()}{note[1:]}." for note in notes])
    except MISTAKES as error:
        end_with(for_people(error))


def shown(settings: Settings) -> Outcome:
    """The run that a person asked for; if it was done before, its files are checked: of a URL, all but the student."""
    outcome = train(settings, wait=settings["sweep"] is not None)
    if outcome.before:
        run, result, names = outcome.run, outcome.result, SEALED
        if run.remote:
            names = [name for name in result.get("files", {}) if name in SEALED]
            for name in names:
                run.copy(name)
        if names:
            run.check(result, *names)
    return outcome


class Outcome(NamedTuple):
    """A run and its result; before: whether it was done already, so that this command trained nothing."""

    run: Run
    result: dict
    before: bool


def train(settings: Settings, wait: bool = True) -> Outcome:
    """The result of a run: read if it is done, resumed if it was begun; its teacher is made first if there is none.

    wait: for another process that works on the same run, instead of raising UserError. With force=true the run is made
    anew. Its old result is removed when the new run begins, after all checks.
    """
    run, teacher, start, where = plan(settings)
    anew = settings["force"] and run.is_done()
    if not anew and (result := run.result()):
        run.settle()
        if where and not where.manifest().exists() and source_of(settings) == "none":
            raise UserError(
                f"{run.name} is done, and nothing was recorded. To train it once more and record it, type:\n"
                f"  {run.removal()}\nand the same command again."
            )
        return Outcome(run, result, before=True)
    if settings["trainer"]["devices"] > 1:
        from kd.launch import rank_launcher

        rank_launcher.check_devices(settings["trainer"])
    packed, parts = prepare(settings)
    for model in (settings["student"]["name"], settings["teacher"]["name"], settings["data"]["tokenizer"]):
        check_student(model)
    name, store = settings["teacher"]["name"], None
    if source_of(settings) == "offline":
        from kd.experiment import stores

        if (record := recording(settings)) and not where.manifest().exists():
            with wandb_agent.hidden():
                train(record)
        name, store = None, stores.stored(settings, packed, parts.keep, lambda: teacher_model(settings, parts))
        requests.end_if_asked()
    elif teacher:
        name = finished(teacher)
    check_tokenizers(settings, parts.tokenizer, name)
    packed = written_by_teacher(settings, packed, parts)
    start_path = finished(start) if start else None
    made = Made(name, start_path, store, plain_text(settings), origins({"teacher": teacher, "start": start}))
    if anew:
        check_logger(settings)
    with run.lock(wait):
        if not anew and (result := run.result()):
            return Outcome(run, result, before=True)
        with run.recorded():
            if settings["trainer"]["devices"] > 1:
                return Outcome(run, fit_in_ranks(run, settings, packed, made), before=False)
            return Outcome(run, fit(run, settings, packed, parts, made), before=False)


def check_logger(settings: Settings) -> None:
    """Raise UserError for a logger that would not start."""
    from kd.runs import loggers

    quiet()
    loggers.check(name_of(settings["logger"]))


class Made(NamedTuple):
    """What was made for a run before it began."""

    teacher: str | None  # folder, or name on the Hub
    start: str | None  # folder of the weights that the student starts from
    store: Store | None
    plain: Packed | None  # text of the language-modelling term, where that is not the data's
    origins: dict[str, dict]  # role -> provenance.origin() of its run

    def student(self, settings: Settings, vocab: int) -> Causal:
        """The student as it starts."""
        from kd.models import causal_lm

        of = {"size": None, "name": self.start} if self.start else settings["student"]
        return causal_lm.build(**of, vocab=vocab, seq_len=settings["data"]["seq_len"], option="student.name")


def estimate(settings: Settings) -> dict[str, Estimate]:
    """What the run takes, and before it its teacher and its store, by name; nothing of what is done."""
    from kd.experiment import planner as estimates
    from kd.experiment import stores

    run, teacher, start, where = plan(settings)
    if not settings["force"] and run.result() is not None:
        return {}
    less, times = estimates.sampled(settings)
    packed, parts = prepare(less)
    check_tokenizers(settings, parts.tokenizer, settings["teacher"]["name"])
    vocab, stored = vocabulary_size(parts.tokenizer), source_of(settings) == "offline"
    record, there = recording(settings), stored and where.manifest().exists()
    first = record or teacher
    made = estimate(first) if first and not there else {}
    made |= estimate(start) if start else {}
    if stored and not there and not record:
        of = stores.described(settings, packed)
        made[f"store {where.folder.name}"] = estimates.of_store(settings, packed, times, parts.keep, vocab, of)
    return made | {run.name: estimates.of_run(settings, packed, times, parts.objective, parts.rollout, vocab)}


def show_plan(all_settings: list[Settings], said: list[str], at_once: float) -> None:
    """Print what runs take, called as `said`, so many at once, and what is made first for them; each thing once."""
    from kd.experiment import planner as estimates

    quiet()
    made, names = {}, {plan(of).run.name: words for of, words in zip(all_settings, said, strict=True)}
    for of in track(all_settings, "measuring steps"):
        made |= {name: takes for name, takes in estimate(of).items() if name not in made}
    done = sum(not of["force"] and plan(of).run.result() is not None for of in all_settings)
    estimates.show(made, names, done, all_settings[0], at_once)


def fit_in_ranks(run: Run, settings: Settings, packed: Packed, made: Made) -> dict:
    """What fit() does, in several processes."""
    from kd.launch import rank_launcher

    run.begin(settings)
    job = {"settings": settings, "run": run.name, "data": str(packed.folder), "teacher": made.teacher}
    job |= {"start": made.start, "plain": str(made.plain.folder) if made.plain else None}
    job["origins"] = made.origins
    job["store"] = [made.store.path, str(made.store.cache)] if made.store else None
    rank_launcher.launch(__file__, run, job, settings["trainer"]["devices"])
    return run.result()


def fit_as_rank(job: rank_launcher.Job) -> None:
    """The part of one process in that: its config comes resolved, and its data, teacher and store are there."""
    from kd.launch import rank_launcher
    from kd.parallel import collectives
    from kd.store.reader import Store

    given, settings = job.given, job.given["settings"]
    if collectives.number():
        warnings.simplefilter("ignore")  # the first says it
    packed = packing.opened(Path(given["data"]))
    store = Store(given["store"][0], Path(given["store"][1])) if given["store"] else None
    plain = packing.opened(Path(given["plain"])) if given["plain"] else None
    made = Made(given["teacher"], given["start"], store, plain, given["origins"])
    run = rank_launcher.Shared(settings["root"], given["run"], job)
    fit(run, settings, packed, Parts(settings, packed), made)


def finished(model: Settings) -> str:
    """The folder of the model that these settings make, trained first if there is none."""
    with wandb_agent.hidden():  # which asked for the run that needs it
        made, result, before = train(model)
    made.check(result, "student")
    if before and (reasons := provenance.reasons(result)):
        console.print(
            f"{made.name}, which this run needs, may not be what this code would make: {'; '.join(reasons)}. To make "
            f"it anew, type:\n  {made.removal()}\nand the same command again, with force=true.", soft_wrap=True,
        )  # fmt: skip
    requests.end_if_asked()
    return str(made / "student")


def origins(models: dict[str, Settings | None]) -> dict[str, dict]:
    """Return what a result keeps of the runs behind it; nothing of a store whose teacher is elsewhere or damaged."""
    found = {}
    for role, settings in models.items():
        with suppress(UserError):
            if settings and (result := plan(settings).run.result()):
                found[role] = provenance.origin(result)
    return found


def prepare(settings: Settings) -> tuple[Packed, Parts]:
    """The data, packed, and the parts of the run, tried; all that can be wrong short of the models is found here."""
    source, how = corpus(settings)
    anew = settings["force"] and not settings["plan"]
    packed = packing.pack(source, home(settings["root"]) / "data", **how, anew=anew)
    parts = Parts(settings, packed)
    if packed.prompts_only:
        check_prompts_only(settings, any(parts.alpha(step / 100) < 1 for step in range(101)))
    if source_of(settings) == "offline":
        from kd.experiment import stores

        stores.opened(settings, packed)
    return packed, parts


def plain_text(settings: Settings) -> Packed | None:
    """The text of the language-modelling term, packed; None where it is the data's own."""
    if settings["lm"] != "plain":
        return None
    source, how = plain_corpus(settings)
    return packing.pack(source, home(settings["root"]) / "data", **how)


def teacher_model(settings: Settings, parts: Parts) -> Causal:
    """The finished teacher, made first if there is none."""
    from kd.models import causal_lm

    quiet()
    _, teacher, _, where = plan(settings)
    name = finished(teacher) if teacher else settings["teacher"]["name"]
    if name is None:
        raise UserError(f"There is no store at {where.path}, and teacher=none cannot write one.")
    check_student(settings["teacher"]["name"])
    check_tokenizers(settings, parts.tokenizer, name)
    return causal_lm.build(None, name, vocabulary_size(parts.tokenizer), settings["data"]["seq_len"], "teacher.name")


def written_by_teacher(settings: Settings, packed: Packed, parts: Parts) -> Packed:
    """The data with what the teacher writes, once: all responses for rollout=teacher, references that are missing."""
    from kd.parallel import collectives
    from kd.rollout import strategies, teacher_text

    writes = name_of(settings["rollout"]) == "teacher"
    sides = (*(["train"] if writes else []), *(["val"] if packed.prompts_only else []))
    if not sides:
        return packed
    of = plan(settings)
    who = of.teacher and plan(of.teacher).run.name, files.stamp(settings["teacher"]["name"]), settings["teacher"]
    made = [packed.folder.name, settings["rollout"] if writes else None, who, *([sides] if packed.prompts_only else [])]
    folder = home(settings["root"]) / "rollouts" / files.digest_of(made)[:16]

    def writers() -> strategies.Writers:
        model = teacher_model(settings, parts).to(collectives.device(settings["trainer"]["accelerator"]))
        return strategies.Writers(None, model, packed.end, settings["teacher"]["seed"])

    return teacher_text.by_teacher(packed, folder, parts.rollout if writes else strategies.teacher, writers, sides)


class Parts:
    """The functions that settings name, tried once on a small random target so that no wrong number gets further."""

    def __init__(self, settings: Settings, packed: Packed):
        import torch

        from kd.objective.chunked import Objective
        from kd.objective.target import Target

        axes = ("loss", "truncation", "target", "temperature", "routing", "alpha", "lr", "logits", "optim", "logger",
                "rollout")  # fmt: skip
        made = {name: conf.build(settings[name], name) for name in axes}
        self.alpha, self.lr, self.logits = made["alpha"], made["lr"], made["logits"]
        self.optim, self.logger = made["optim"], made["logger"]
        self.route, self.rollout = made["routing"], made["rollout"]
        node = {k: v for k, v in (settings["record"] or settings["truncation"]).items() if k != "path"}
        # What a store keeps; None for everything.
        self.keep = conf.build(node, "record") if kept_of(node) != {"name": "full"} else None
        trainer = settings["trainer"]
        self.objective = Objective(
            made["loss"], made["truncation"], made["target"], made["temperature"], trainer["chunk"], trainer["compile"]
        )
        self.tokenizer = load_tokenizer(str(packed.tokenizer), "The tokenizer of the packed data")
        vocab = vocabulary_size(self.tokenizer)
        logp = torch.linspace(0, 1, 2 * vocab).view(2, vocab).sin().log_softmax(-1)
        known = {name: torch.ones(2) for name in self.rollout(None).gives} | self.route(lambda measure: torch.zeros(2))
        known |= {
            name: torch.tensor([0.0, 1.0]) for name in ("by_student", "hard") if name in known
        }  # one of each kind
        zeros = torch.zeros(2, dtype=torch.long)
        target = Target(zeros, logp, seed=zeros, sampled=known)
        if self.keep is not None:
            try:
                self.keep(target)
            except UserError as error:
                group = "record" if settings["record"] else "truncation"
                raise UserError(str(error).replace("truncation.", f"{group}.")) from None
        student = logp.flip(0).requires_grad_()
        self.objective.distance(student, target).sum().backward()
        if not student.grad.any():
            raise UserError(
                "This loss has no gradient on what the truncation keeps, so the student would learn nothing from it "
                "(mse compares differences of logits, and one token has none): keep more, e.g. truncation.k=10."
            )
        try:
            self.optim([{"params": [torch.nn.Parameter(torch.zeros(1))], "width": 1}])
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # as torch says it
            raise UserError(f"optim: {error}.") from None
        for progress in (step / 100 for step in range(101)):
            if not 0 <= self.alpha(progress) <= 1:
                raise UserError(
                    f"alpha is {self.alpha(progress)} at {progress:.0%} of the run: need a share from 0 to 1."
                )
            if not 0 <= self.lr(progress) < math.inf:
                raise UserError(f"lr is {self.lr(progress)} at {progress:.0%} of the run: need a number of at least 0.")
        if settings["lm"] == "plain" and all(self.alpha(step / 100) == 1 for step in range(101)):
            raise UserError(
                "lm=plain would do nothing, as alpha is 1 throughout; type alpha.peak=0.5, or leave it out."
            )


def check_tokenizers(settings: Settings, ours, teacher_name: str | None) -> None:
    """Raise UserError unless pretrained models use the tokenizer of the data."""
    from kd.models import causal_lm

    for option, name in (("student.name", settings["student"]["name"]), ("teacher.name", teacher_name)):
        if name:
            theirs = load_tokenizer(name, f"The tokenizer of {option}={name}")
            causal_lm.same_vocabulary(ours, theirs, f"{option}={name}", settings["token_names"] == "any")
            causal_lm.check_rows(theirs, name, option)


def fit(run: Run, settings: Settings, packed: Packed, parts: Parts, made: Made) -> dict:
    """Train, or go on with training, and write the result."""
    import lightning
    import torch

    from kd.evaluation import responses
    from kd.experiment import stores
    from kd.models import causal_lm, flops
    from kd.parallel import collectives, ddp, fsdp
    from kd.rollout import generate, strategies
    from kd.runs.loggers import MetricsFile, Performance, views
    from kd.system.checkpoint_files import DigestIO, newest
    from kd.system.hardware import out_of_memory, slowdown_in_bf16
    from kd.teachers import sources
    from kd.training.checkpoints import Checkpoints
    from kd.training.module import Distillation, NonFinite

    quiet()
    of, flat = settings["trainer"], conf.flat(settings)
    code = {"environment": environment(), "sources": provenance.sources(flat)}  # before anybody edits it
    code["origins"] = made.origins
    for group, rows in (("data", packed), ("plain", made.plain)):
        if rows and group in code["sources"] and (kept := packing.code_of(rows.folder)):
            code["sources"][group] = kept
    lightning.seed_everything(settings["seed"], verbose=False)
    seq_len, vocab = settings["data"]["seq_len"], vocabulary_size(parts.tokenizer)
    student, teacher_name, store = made.student(settings, vocab), made.teacher, made.store
    costs = {"student": flops.cost(student.model, seq_len)}
    how, teacher, among, objective = source_of(settings), None, None, parts.objective
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
    loggers += views(parts.logger, run.folder, told) if first else []
    progress = Steps(told.name, of["steps"], start, shown=first)
    passes = -(-len(packed.val) // (of["micro_batch"] * collectives.count())) if sharded else 0
    validation = ValidationBatches(
        packed.val, of["micro_batch"], collectives.share(len(packed.val)), passes, packed.val_spans, packed.boundary
    )
    recorder = None
    if how == "none" and settings["record"]:
        recorder = stores.recorder(settings, packed, parts.keep, student, start)
    writers = strategies.Writers(student, teacher, packed.end, settings["seed"], of["micro_batch"])
    module = Distillation(
        student, teacher, parts.logits(store or teacher), objective, parts.alpha, parts.lr, parts.optim,
        steps=of["steps"], micro_batch=of["micro_batch"], clip=of["clip"], log_every=of["log_every"],
        val_every=of["val_every"], validation=validation,
        flops=flops.step_flops(how, flat["routing"] != "none", costs["student"], costs.get("teacher")),
        bytes_per_token=packed.bytes_per_token, watch=progress.update,
        reference=store.reference if store else sources.online(teacher) if teacher else None, learns=how == "cotrained",
        recorder=recorder, sharded=sharded, route=parts.route,
        rollout=None if name_of(settings["rollout"]) in ("none", "teacher") else parts.rollout(writers),
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
        kept = made.teacher and responses.kept(
            settings["root"], packed, made.teacher, **asked, precision=of["precision"]
        )
        callbacks.append(responses.Responses(run.folder, packed, parts.tokenizer, kept, of["chunk"], **asked))
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
    for text, there in (("data", rows), ("plain text", len(made.plain.train) if made.plain else of["batch"])):
        if first and of["batch"] > there:
            console.print(f"A batch of {of['batch']:,} rows is larger than the {text}, of {there:,} rows: each step "
                          f"reads some of them more than once. Type trainer.batch={there}, or take more text.",
                          soft_wrap=True)  # fmt: skip
    final = None  # until all of the run is done
    try:
        order = of["batch"], settings["seed"], start, of["steps"]
        mine = collectives.share(of["batch"])
        plain = made.plain
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
            student = made.student(settings, vocab)
            student.load_state_dict(weights)
        export(run, student.model, parts.tokenizer, row_ends(settings, packed, parts.tokenizer), settings, result)
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
                f"{error}\nTake trainer.chunk={max(1, (parts.objective.chunk or 256) // 2)}, a smaller model, or "
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
    from kd.parallel import collectives, fsdp

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


def quiet() -> None:
    """Leave out what libraries say about things that are meant as they are."""
    import transformers

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for message in (".*does not have many workers.*", ".*GPU available but not used.*", ".*isinstance.treespec.*"):
        warnings.filterwarnings("ignore", message)


def write_store(words: list[str]) -> Store | None:
    """What `python -m kd.store write` does; None for one part of several."""
    from kd.experiment import stores

    words = files.expanded_words(words)
    security.check_secrets(words)
    part = next((word for word in words if word.startswith("part=")), "part=1/1")
    numbers = re.fullmatch(r"part=(\d+)/(\d+)", part)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f"{part}: need which part of how many, e.g. part=1/2.")
    words = [word for word in words if word != part]
    security.check_words(["logits=offline", *words])
    with hydra.initialize_config_dir(str(conf.CONF), version_base="1.3"):
        try:
            cfg = hydra.compose("config", ["logits=offline", *words])
        except HydraException as error:
            raise UserError(str(error)) from None
        settings = resolve(cfg, words)
        if settings["record"]:  # whatever a student asks for
            settings["truncation"] = {k: v for k, v in settings["record"].items() if k != "path"}
        packed, parts = prepare(settings)
        share = int(numbers[1]), int(numbers[2])
        found = stores.opened(settings, packed)
        found = found or stores.write(settings, packed, parts.keep, teacher_model(settings, parts), share)
        if found is None:
            folder = plan(settings).store.folder
            console.print(f"Part {share[0]} of {share[1]} is in {folder}. When all parts are on one disk, type\n"
                          f"  python -m kd.store merge STORE {folder} …", soft_wrap=True)  # fmt: skip
        return found


def pack_data(words: list[str]) -> tuple[Settings, Packed]:
    """The settings of `python train.py WORDS`, and its data, packed."""
    words = files.expanded_words(words)
    security.check_words(words)
    with hydra.initialize_config_dir(str(conf.CONF), version_base="1.3"):
        try:
            cfg = hydra.compose("config", words)
        except HydraException as error:
            raise UserError(str(error)) from None
        settings = resolve(cfg, words)
        quiet()
        source, how = corpus(settings)
        return settings, packing.pack(source, home(settings["root"]) / "data", **how, announce=False)


def compare_with_teacher(store: Store, root: str) -> str:
    """Recompute some rows of a store with its teacher, if that is at hand."""
    from kd.experiment import stores

    if "steps" in store.manifest:
        return "It was recorded from a teacher in training, so no row can be computed again."
    with hydra.initialize_config_dir(str(conf.CONF), version_base="1.3"):
        settings = conf.renamed(store.manifest["settings"]) | {"root": root}
        settings["logits"] = settings["logits"] | {"path": store.path}  # it may have been moved
        try:
            conf.check_targets(settings)
            conf.check_plain(settings)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{store.path}: its settings are not those of a run ({error!r}).") from None
        teacher, name = plan(settings).teacher, settings["teacher"]["name"]
        if (teacher and not plan(teacher).run.result()) or (name and not teacher and not Path(name).is_dir()):
            return f"Its teacher {store.of['teacher']} is not in {root}, so no row was computed again."
        packed, parts = prepare(settings)
        return stores.compare(
            store, packed, parts.keep, teacher_model(settings, parts), settings["trainer"]["accelerator"]
        )


try:
    conf.register()
except UserError as error:
    end_with(error)
hydra_plugins.register(resolve=resolve, plan=plan, prepare=prepare, show_plan=show_plan)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:  # one of several processes of a run, started by kd.launch.rank_launcher
        from kd.launch import rank_launcher

        rank_launcher.work(sys.argv[2:], fit_as_rank)
    else:
        end_with_parent()
        try:
            sys.argv[1:] = files.expanded_words(sys.argv[1:])
            security.check_command_line(sys.argv[1:])
        except UserError as error:
            end_with(error)
        try:
            main()
        except Preempted:
            wandb_agent.end()
            raise

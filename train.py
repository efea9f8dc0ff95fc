"""From a config to a result: the wiring, and the only file that sees the config.

python train.py                                   one run with the defaults
python train.py loss=akl student=1m               another one
python train.py sweeps=demo                       many
python train.py --help                            the axes and their options
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from functools import cache
from pathlib import Path

# Before torch is loaded: its threads are to sleep while they wait, not to spin, or runs that share cores slow each
# other down by far more than their share.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd import config as conf
from kd import data, files, sweep
from kd.errors import UserError
from kd.progress import Steps, end_with, show
from kd.run import NO_SIGNAL, Run, about, environment, export, group_of, identity, peak_memory

Settings = conf.Node


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Lightning alone would end with exit code 0
    try:
        settings = resolve(cfg, HydraConfig.get().overrides.task)
        run, result = train(settings, wait=settings["sweep"] is not None)
        show(run, result)
    except (UserError, PermissionError) as error:
        end_with(error)


def resolve(cfg: DictConfig, typed: list[str]) -> Settings:
    """The config as plain containers, checked as far as that is possible before data and models are there."""
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} is needed here: type {missing[0]}=VALUE.")
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from None
    conf.check_targets(settings)
    conf.check_plain(settings)
    if settings["logits"]["_target_"] == "kd.logits.none":
        for word in typed:
            if group_of(word) in NO_SIGNAL:
                raise UserError(
                    f"logits=none trains on text alone; {word} would do nothing: leave it out, or take logits=online."
                )
    elif not any(settings["teacher"].get(k) for k in ("size", "name")):
        raise UserError("logits=online needs a teacher: type teacher=1m, or logits=none to train without one.")
    own = tokenizer_name(settings)
    if settings["data"]["_target_"] == "kd.corpora.markov":
        own = "the states of the chain"
    if own and any(word.lstrip("+").startswith("data.vocab=") for word in typed):
        raise UserError(f"data.vocab would do nothing: no tokenizer is trained, since there is {own}. Leave it out.")
    return settings


def plan(settings: Settings) -> tuple[Run, Settings | None]:
    """The run that settings describe, and the settings of the run that makes its teacher, if it is to be made.

    Fast: no model, no torch. Data and teacher are part of a run's identity.
    """
    source, packing = corpus(settings)
    teacher = None
    digests = {"data": data.key(source, **packing)}
    for role in ("student", "teacher"):
        if stamp := files.stamp(settings[role]["name"]):
            digests[f"{role}.name"] = stamp
    if settings["teacher"]["size"]:
        teacher = teacher_settings(settings)
        digests["teacher"] = plan(teacher)[0].name
    return Run(Path(settings["root"]), identity(conf.flat(settings), **digests)), teacher


def corpus(settings: Settings):
    """The text, and how it is packed; a pretrained model brings its own tokenizer."""
    node = settings["data"]
    make = conf.load(node["_target_"], "data")
    for name in node.keys() - {
        "_target_",
        *inspect.signature(make).parameters,
        *inspect.signature(data.pack).parameters,
    }:
        raise UserError(f"data.{name}={node[name]}: no such option of this data.")
    source = cached_corpus(make, **conf.checked(make, node, "data"))
    packing = conf.checked(data.pack, node, "data")
    if source.words and node["tokenizer"]:
        raise UserError(f"data.tokenizer={node['tokenizer']}: this data has a vocabulary of its own; leave it out.")
    if not source.words:
        packing["tokenizer"] = tokenizer_name(settings)
    return source, packing


def tokenizer_name(settings: Settings) -> str | None:
    """The pretrained tokenizer to use: the one asked for, else that of a pretrained model; None trains one."""
    return settings["data"]["tokenizer"] or settings["student"]["name"] or settings["teacher"]["name"]


@cache
def cached_corpus(make, **arguments):
    """A sweep asks for the same corpus once per run."""
    return make(**arguments)


def teacher_settings(settings: Settings) -> Settings:
    """A teacher of a size is itself a run: language modelling with the defaults, whatever the student's settings are.

    It is what `python train.py logits=none teacher=none student=SIZE trainer.steps=… lr.peak=… data=…` would be.
    """
    of = settings["teacher"]
    typed = [f"student={of['size']}", "teacher=none", "logits=none", f"seed={of['seed']}", f"lr.peak={of['lr']}"]
    typed += [f"trainer.{k}={of[k]}" for k in ("steps", "batch", "precision")] + [f"trainer.micro_batch={of['batch']}"]
    made = resolve(hydra.compose("config", typed), typed)
    packing = corpus(settings)[1]
    made["data"] = settings["data"] | {"tokenizer": packing["tokenizer"]}
    made["trainer"]["accelerator"] = settings["trainer"]["accelerator"]
    return made | {k: settings[k] for k in ("root", "logger", "sweep")}


def train(settings: Settings, wait: bool = True) -> tuple[Run, dict]:
    """The result of a run: read if it is done, resumed if it was begun; its teacher is made first if there is none.

    wait: for another process that works on the same run, instead of raising UserError.
    """
    run, teacher = plan(settings)
    if result := run.result():
        return run, result
    packed, parts = prepare(settings)
    name = settings["teacher"]["name"]
    if teacher:
        made, outcome = train(teacher)
        made.verify(outcome)
        name = str(made / "student")
    check_tokenizers(settings, parts.tokenizer, name)
    with run.lock(wait):
        if result := run.result():
            return run, result
        return run, fit(run, settings, packed, parts, name)


def prepare(settings: Settings) -> tuple[data.Packed, Parts]:
    """The data, packed, and the parts of the run, tried; all that can be wrong short of the models is found here."""
    source, packing = corpus(settings)
    packed = data.pack(source, Path(settings["root"]) / "data", **packing)
    return packed, Parts(settings, packed)


class Parts:
    """The functions that settings name, tried once on a small random target so that no wrong number gets further."""

    def __init__(self, settings: Settings, packed: data.Packed):
        import torch
        from transformers import AutoTokenizer

        from kd.objective import Objective
        from kd.target import Target

        axes = ("loss", "truncation", "temperature", "alpha", "lr", "logits", "optim", "logger")
        made = {name: conf.build(settings[name], name) for name in axes}
        self.alpha, self.lr, self.logits = made["alpha"], made["lr"], made["logits"]
        self.optim, self.logger = made["optim"], made["logger"]
        trainer = settings["trainer"]
        self.objective = Objective(
            made["loss"], made["truncation"], made["temperature"], trainer["chunk"], trainer["compile"]
        )
        self.tokenizer = AutoTokenizer.from_pretrained(packed.tokenizer)
        vocab = len(self.tokenizer)
        logp = torch.linspace(0, 1, 2 * vocab).view(2, vocab).sin().log_softmax(-1)
        target = Target(torch.zeros(2, dtype=torch.long), logp, seed=torch.zeros(2, dtype=torch.long))
        student = logp.flip(0).requires_grad_()
        self.objective.distance(student, target).sum().backward()
        if not student.grad.any():
            raise UserError(
                "This loss has no gradient on what the truncation keeps, so the student would learn nothing from it "
                "(mse compares differences of logits, and one token has none): keep more, e.g. truncation.k=10."
            )
        try:
            self.optim([torch.nn.Parameter(torch.zeros(1))])
        except (ValueError, TypeError) as error:
            raise UserError(f"optim: {error}.") from None
        for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
            if not 0 <= self.alpha(progress) <= 1:
                raise UserError(
                    f"alpha is {self.alpha(progress)} at {progress:.0%} of the run: need a share from 0 to 1."
                )
            if not 0 <= self.lr(progress) < math.inf:
                raise UserError(f"lr is {self.lr(progress)} at {progress:.0%} of the run: need a number of at least 0.")


def check_tokenizers(settings: Settings, ours, teacher_name: str | None) -> None:
    """Raise UserError unless pretrained models use the tokenizer of the data."""
    from transformers import AutoTokenizer

    from kd import models

    for option, name in (("student.name", settings["student"]["name"]), ("teacher.name", teacher_name)):
        if name:
            theirs = models.from_hub(AutoTokenizer, name, f"The tokenizer of {option}={name}")
            models.same_vocabulary(ours, theirs, f"{option}={name}")


def fit(run: Run, settings: Settings, packed: data.Packed, parts: Parts, teacher_name: str | None) -> dict:
    """Train, or go on with training, and write the result."""
    import lightning

    from kd import models
    from kd.checkpoint import Checkpoints, DigestIO, newest
    from kd.loggers import MetricsFile
    from kd.module import Distillation, Flops, NonFinite

    quiet()
    of, flat = settings["trainer"], conf.flat(settings)
    lightning.seed_everything(settings["seed"], verbose=False)
    seq_len, vocab = settings["data"]["seq_len"], len(parts.tokenizer)
    student = models.build(**settings["student"], vocab=vocab, seq_len=seq_len, option="student.name")
    costs = {"student": models.cost(student.model, seq_len)}
    teacher = None
    if teacher_name:
        teacher = models.build(None, teacher_name, vocab, seq_len, "teacher.name")
        costs["teacher"] = models.cost(teacher.model, seq_len)
    run.begin(settings)
    checkpoint = newest(run / "checkpoints")
    start = int(checkpoint.stem.partition("-")[2]) if checkpoint else 0
    told = about(run, flat, costs)
    loggers = [MetricsFile(run / "metrics.jsonl", start), *parts.logger(folder=run.folder, about=told)]
    progress = Steps(told.name, of["steps"], start)
    module = Distillation(
        student, teacher, parts.logits(teacher), parts.objective, parts.alpha, parts.lr, parts.optim,
        steps=of["steps"], micro_batch=of["micro_batch"], clip=of["clip"], log_every=of["log_every"],
        val_every=of["val_every"], validation=data.ValidationBatches(packed.val, of["micro_batch"]),
        flops=Flops(3 * costs["student"].flops_per_token, costs["teacher"].flops_per_token if teacher else 0.0),
        bytes_per_token=packed.bytes_per_token, watch=progress.update,
    )  # fmt: skip
    if of["compile"]:
        for model in (student, *module.outside):
            model.model.base_model.compile()
    trainer = lightning.Trainer(
        accelerator=of["accelerator"], devices=1, precision={"fp32": "32-true", "bf16": "bf16-mixed"}[of["precision"]],
        max_steps=of["steps"], max_epochs=-1, logger=loggers, plugins=[DigestIO()],
        callbacks=[Checkpoints(run / "checkpoints", of["checkpoint_every"])],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=run.folder,
    )  # fmt: skip
    final = None
    try:
        batches = data.Batches(packed.train, of["batch"], settings["seed"], start, of["steps"])
        trainer.fit(module, batches, ckpt_path=checkpoint)
        final = module.val_metrics
        result = {
            "state": "done", "run": run.name, "config": flat, "environment": environment(),
            "parameters": costs["student"].parameters, "non_embedding": costs["student"].non_embedding,
            "teacher_parameters": costs["teacher"].parameters if teacher else None,
            "train_rows": len(packed.train), "entropy": packed.entropy, "bytes_per_token": packed.bytes_per_token,
            "tokens": module.tokens, "flops": module.flops, "seconds": round(module.seconds, 2),
            "peak_memory": peak_memory(), "final": final,
        }  # fmt: skip
        export(run, student.model, parts.tokenizer, settings, result)
        result["weights"] = run.weights()
        run.finish(result)
        return result
    except NonFinite as error:
        where = run.fail(str(error), **error.report)
        raise UserError(f"{told.name}: {error}. Not counted as a result; what is known of it is in {where}.") from None
    except Exception as error:
        run.fail(f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        raise
    finally:
        progress.stop()
        for logger in loggers:
            logger.close(final)


def quiet() -> None:
    """Leave out what libraries say about things that are meant as they are."""
    import transformers

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for message in (".*does not have many workers.*", ".*GPU available but not used.*", ".*isinstance.treespec.*"):
        warnings.filterwarnings("ignore", message)


conf.register()
sweep.register(resolve, plan, prepare)

if __name__ == "__main__":
    conf.check_words(sys.argv[1:])
    main()

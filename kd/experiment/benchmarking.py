"""Benchmarks of finished runs: made after the training, and added to results that lack them."""

from __future__ import annotations

import gc
import warnings

import torch

from kd.config.schema import ExperimentConfig
from kd.evaluation import benchmarks
from kd.evaluation.benchmarks import Benchmark
from kd.parallel import collectives
from kd.runs import loggers
from kd.runs.run import Run
from kd.runs.seal import digest_of_result, is_sealed
from kd.system import files
from kd.system.console import console
from kd.system.signals import requests


def missing(config: ExperimentConfig, result: dict | None) -> list[Benchmark]:
    """Return the benchmarks that a result lacks, or has of other files; raise UserError for wrong names."""
    named = benchmarks.benchmarks_of(config.benchmarks)
    have = (result or {}).get("benchmarks", {})
    return [x for x in named if config.force or x.name not in have or have[x.name]["files"] != x.digest]


def check(config: ExperimentConfig, result: dict | None) -> None:
    """Raise UserError for benchmarks that could not be made after the training."""
    if config.benchmarks:
        benchmarks.check_data(missing(config, result))


def add(run: Run, config: ExperimentConfig, result: dict) -> dict:
    """Make the benchmarks that a finished run lacks, and return its result with them.

    Each is written when it is done, so that an interrupted command goes on with the next.
    """
    lacking = missing(config, result)
    if not lacking:
        return result
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    model, trainer = config.student.name, config.trainer
    if not config.is_evaluation:
        run.check(result, "student")
        model = str(run / "student")
    assert model is not None, "an evaluation has a student by name"
    console.print(f"{run.name}: {', '.join(x.name for x in lacking)}", soft_wrap=True)
    with run.lock(wait=True):
        device = str(collectives.device(trainer.accelerator))
        for benchmark, measured in benchmarks.measure(model, lacking, device, trainer.micro_batch):
            result = run.result() or result  # as another process may have left it
            measured_all = result.get("benchmarks", {}) | {benchmark.name: measured}
            final = result["final"] | benchmarks.final_metrics(measured_all)
            result = amended(run, result | {"benchmarks": measured_all, "final": final})
            requests.end_if_asked()
    try:
        loggers.add_final(run, config, result)
    except Exception as error:  # a view: its errors lose no result
        warnings.warn(f"{config.logger.name} did not get the benchmarks of {run.name} ({error}).")
    return result


def amended(run: Run, result: dict) -> dict:
    """Write the result of a finished run anew, and return it. The caller has to hold the lock."""
    if is_sealed(result):
        result = result | {"digest": digest_of_result(result)}
    if run.remote:
        run.remote.write("result.json", result)
    files.write_json(run / "result.json", result)
    return result

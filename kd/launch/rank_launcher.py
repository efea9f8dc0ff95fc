"""One run in several processes, its ranks: their start and end, the resolved config, and the first error.

The process that a person starts then trains nothing. It makes data, teacher and store, holds the run's lock, and serves
the resolved config to its ranks, which compose none of their own. If one of them fails, it ends the others. If it is
itself gone, by SIGKILL even, they end at once.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from kd.parallel import collectives
from kd.runs.outcome import Outcome, RunState, classify, classify_kill

if TYPE_CHECKING:
    from kd.experiment.prerequisites import Inputs

import gc
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kd.config.schema import ExperimentConfig
from kd.errors import UserError, for_people, is_mistake
from kd.parallel.collectives import cpu_group, rank
from kd.runs.run import Run
from kd.system.launchers import OWN
from kd.system.processes import killed_for_memory
from kd.system.signals import EXIT_CODE, Preempted, requests

WORD = "--rank"  # word that makes train.py a rank: --rank NUMBER/OF PORT


class Job:
    """Exchange between a rank and the process that started it."""

    def __init__(self, place: str, port: str):
        requests.ignore_signals = True
        requests.watch()
        threading.Thread(target=_listen, daemon=True).start()
        rank, world_size = map(int, place.split("/"))
        self.store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
        self.given = json.loads(self.store.get("job"))
        accelerator = self.given["config"]["trainer"]["accelerator"]
        backend = "gloo" if cpu_group(accelerator) == "cpu" else "cpu:gloo,cuda:nccl"
        if backend != "gloo":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, store=dist.PrefixStore("group", self.store), rank=rank, world_size=world_size)

    def tell(self, what: str, value) -> bool:
        """Publish a value unless another rank published one first; return True if this one was stored."""
        entry = json.dumps([rank(), value])
        return self.store.compare_set(what, "", entry).decode() == entry


class Shared(Run):
    """Folder of a run for its ranks. The process that started them starts the run, and writes why it failed."""

    def __init__(self, root: str | Path, name: str, job: Job):
        super().__init__(root, name)
        self.job = job

    def start(self, config: ExperimentConfig) -> None:
        pass

    def end(self, outcome: Outcome) -> Path:
        if outcome.state == RunState.DONE:
            return super().end(outcome)
        self.job.tell("end", outcome.to_json())
        return self / "state.json"


def work(words: list[str]) -> None:
    """Do the work of a rank, from its words to its exit code."""
    job = Job(*words)
    try:
        fit_as_rank(job)
    except Exception as error:  # the process that started this one prints it, if it was the first
        if is_mistake(error):
            job.tell("message", str(for_people(error)))
            sys.exit(2)
        job.tell("end", replace(classify(error), exit_code=2).to_json())
        sys.exit(1)


def _listen() -> None:
    """Obey the requests on standard input of the process that started this one; end when that process is gone."""
    while os.read(0, 1):
        requests.ask()
    os._exit(1)


def launch(program: str, run: Run, job: dict, ranks: int) -> None:
    """Start `ranks` processes for a job, and wait for them. The job's config is that of a run.

    Raises UserError as soon as one of them fails. The others are ended, and state.json has the reason. A first request
    to end is passed to the ranks, which save a checkpoint first. A second one ends them at once.
    """
    gc.collect()
    if torch.cuda.is_initialized():  # a teacher was made here, and its memory is the first rank's now
        torch.cuda.empty_cache()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    server.set("job", json.dumps(job))
    processes, killed = [], killed_for_memory()
    try:
        for rank in range(ranks):
            threads = str(max(1, (os.cpu_count() or 1) // ranks))
            environment = {"OMP_NUM_THREADS": threads} | os.environ | {OWN: str(rank)}
            command = [sys.executable, program, WORD, f"{rank}/{ranks}", str(server.port)]
            # In sessions of their own, so that Ctrl-C reaches this process alone, which ends them.
            processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True))
        requests.end_if_asked()
        codes = _watch(processes)
    except Preempted:
        for pipe in [process.stdin for process in processes if process.stdin]:
            with suppress(OSError):
                os.write(pipe.fileno(), b"x")
        try:
            while any(process.poll() is None for process in processes):  # a second signal ends it
                time.sleep(0.05)
        finally:  # ranks that saved a checkpoint have published its step
            _preempted(run, server)
        raise
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
    if EXIT_CODE in codes:
        _preempted(run, server)
        raise Preempted
    if any(codes):
        _failed(run, server, codes, killed_for_memory() > killed)


def _watch(processes: list[subprocess.Popen]) -> list[int | None]:
    """Return the exit codes once all have succeeded or one has failed."""
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [process.poll() for process in processes]
    return codes


def _published(server: dist.TCPStore, key: str):
    """Return the value that a rank published under a key; None if no rank did."""
    return json.loads(server.get(key))[1] if server.check([key]) else None


def _outcome(server: dist.TCPStore) -> Outcome | None:
    """Return the outcome of the run that a rank published first."""
    end = _published(server, "end")
    return Outcome.from_json(end) if end else None


def _preempted(run: Run, server: dist.TCPStore) -> None:
    """Write that the run was requested to end, and in which step, if a rank published it."""
    outcome = _outcome(server)
    run.end(outcome if outcome and outcome.state == RunState.PREEMPTED else classify(Preempted()))


def _failed(run: Run, server: dist.TCPStore, codes: list[int | None], out_of_memory: bool):
    """Write which rank failed first, and why, and raise UserError.

    A rank that was killed published nothing, and the others then know only that it is gone.
    """
    message, ranks = _published(server, "message"), len(codes)
    rank, code = next(((r, c) for r, c in enumerate(codes) if c and c < 0), (None, 0))
    if rank is not None:
        kill = classify_kill(code, out_of_memory)
        outcome, message = replace(kill, reason=f"rank {rank} of {ranks}: {kill.reason}", exit_code=2), None
    else:
        rank, code = next((r, c) for r, c in enumerate(codes) if c)
        outcome = _outcome(server) or Outcome(
            RunState.FAILED, message or f"rank {rank} of {ranks} ended with exit code {code}", 2
        )
    report_path = run.end(outcome)
    if message is None:
        print(outcome.details.get("traceback", ""), file=sys.stderr, end="")
        why, hint = (
            f"{outcome.reason}. The report of the run is in {report_path}",
            "type the same command to continue the run",
        )
        raise UserError(option=run.name, why=why, hint=hint)
    raise UserError(message)


def fit_in_ranks(program: str, run: Run, config: ExperimentConfig, inputs: Inputs) -> dict:
    """Train in several processes, each of which is `program` with the words of a rank, and return the result."""
    from kd.experiment.fit import as_job

    run.start(config)
    launch(program, run, as_job(run, config, inputs), config.trainer.devices)
    result = run.result()
    assert result is not None, "the first rank has written it"
    return result


def fit_as_rank(job: Job) -> None:
    """Train as one of several processes."""
    from kd.experiment.fit import fit, from_job

    if collectives.rank():
        warnings.simplefilter("ignore")  # the first rank shows them
    config = ExperimentConfig.from_dict(job.given["config"])
    fit(Shared(config.root, job.given["run"], job), config, from_job(job.given, config))

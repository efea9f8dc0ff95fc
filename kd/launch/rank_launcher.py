"""Ranks of a run on one machine, which torch's elastic agent starts, watches and starts again; see kd/launch/ranks.py.

The process that a person starts then trains nothing. A first request to end goes to the ranks, which save a checkpoint
first, however long a step takes. A second one ends them at once. If this process is gone, they end too.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import filelock
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.parallel.collectives import check_devices
from kd.runs.outcome import Outcome, RunState, classify, classify_kill
from kd.runs.run import Run
from kd.system import files
from kd.system.processes import killed_for_memory
from kd.system.programs import TRAIN
from kd.system.signals import EXIT_CODE, Preempted, requests

WORD = "--rank"  # word that makes train.py a rank: --rank FILE, with the config
AGES = 10**9  # seconds, for a step that takes its time before a checkpoint is saved
TOGETHER = 20  # seconds after the first failure; the agent kills later what does not end


def launch(run: Run, config: ExperimentConfig) -> dict:
    """Train in several processes, and return the result.

    Raises UserError as soon as one of them fails for the last time. The others are ended; state.json has the reason.
    """
    check_devices(config.trainer)
    silent = logging.getLogger("torch.distributed.elastic")
    silent.addHandler(logging.NullHandler())
    silent.propagate = False
    trainer, killed = config.trainer, killed_for_memory()
    threads = str(max(1, (os.cpu_count() or 1) // trainer.devices))
    with (
        tempfile.TemporaryDirectory(prefix="kd-ranks-") as folder,
        variables(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads), TORCHELASTIC_SIGNALS_TO_HANDLE="SIGQUIT"),
    ):
        path = Path(folder, "config.json")
        files.write_json(path, config.to_dict())
        place = RendezvousParameters("c10d", "localhost:0", run.name, 1, 1, local_addr="127.0.0.1")
        spec = WorkerSpec(
            role="rank", local_world_size=trainer.devices, rdzv_handler=registry.get_rendezvous_handler(place),
            entrypoint=sys.executable, args=(str(TRAIN), WORD, str(path)), max_restarts=trainer.max_restarts,
        )  # fmt: skip
        agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder), shutdown_timeout=AGES)
        try:
            failures = agent.run().failures
        except BaseException as error:
            _kill(agent)
            if not run.ended_here():
                _record(run, classify(error))
            raise
        finally:
            spec.rdzv_handler.shutdown()
    if failures:
        requests.end_if_asked()
        _fail(run, failures, trainer.devices, killed_for_memory() > killed)
    result = run.result()
    assert result is not None, "rank 0 has written it"
    return result


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _kill(agent: LocalElasticAgent) -> None:
    """End the ranks that an agent leaves."""
    for worker in agent.get_worker_group().workers:
        with suppress(TypeError, ProcessLookupError, ChildProcessError):  # not started, or over
            os.kill(worker.id, signal.SIGKILL)
            os.waitpid(worker.id, 0)


def _record(run: Run, outcome: Outcome) -> Path:
    """Write how the ranks ended, unless another process works on the run by now."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with suppress(filelock.Timeout), filelock.FileLock(run / ".lock", timeout=0):
        run.end(outcome)
    return run / "state.json"


def _fail(run: Run, failures: dict[int, ProcessFailure], ranks: int, out_of_memory: bool) -> None:
    """Raise the error of the rank that failed first. A rank that was killed wrote nothing, so it is recorded here.

    The others then know only that it is gone. The agent ends them by SIGTERM.
    """
    first = min(failure.timestamp for failure in failures.values())
    ended = {rank: f for rank, f in failures.items() if f.exitcode not in (EXIT_CODE, -signal.SIGTERM)}
    killed = [rank for rank, f in ended.items() if f.exitcode < 0 and f.timestamp - first < TOGETHER]
    if not ended:
        raise Preempted
    if killed:
        kill = classify_kill(ended[killed[0]].exitcode, out_of_memory)
        outcome = replace(kill, reason=f"rank {killed[0]} of {ranks}: {kill.reason}", exit_code=2)
        _record(run, outcome)
    elif any(failure.exitcode == 2 for failure in ended.values()):
        sys.exit(2)  # that rank has printed why
    else:
        rank = min(ended, key=lambda rank: (isinstance(ended[rank].message, str), ended[rank].timestamp))
        reason, message = f"rank {rank} of {ranks} ended with exit code {ended[rank].exitcode}", ended[rank].message
        if isinstance(message, dict):  # of the one rank that wrote its error
            print(message["extraInfo"]["py_callstack"], file=sys.stderr, end="")
            reason = message["message"].partition("\n")[0]
        outcome = Outcome(RunState.FAILED, reason, 2)
        if not run.ended_here():
            _record(run, outcome)
    why = f"{outcome.reason}. The report of the run is in {run / 'state.json'}"
    raise UserError(option=run.name, why=why, hint="type the same command to continue the run")

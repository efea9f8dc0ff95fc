"""One run in several processes, its ranks, of one machine or several: the work of each.

Each rank composes its own config, or gets it from kd/launch/rank_launcher.py, and works only if all have the same one.
Rank 0 alone makes what the run needs, holds its lock and writes its result.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import warnings
from pathlib import Path

from kd.config.schema import ExperimentConfig
from kd.errors import MISTAKES, UserError, for_people, typed
from kd.parallel.collectives import check_devices
from kd.parallel.place import Place, place_of
from kd.parallel.rendezvous import Rendezvous
from kd.runs import provenance
from kd.runs.outcome import Outcome, RunState
from kd.runs.run import Run
from kd.system import launchers, processes
from kd.system.console import console, exit_with_error
from kd.system.remote import create_root
from kd.system.signals import requests

VISIBLE = 60  # seconds until a file of another machine has to be visible


class SharedRun(Run):
    """Folder of a run for its ranks. Rank 0 starts the run; the first rank that ends without a result writes why."""

    def __init__(self, run: Run, rendezvous: Rendezvous):
        super().__init__(run.root, run.name)
        self.rendezvous = rendezvous

    def start(self, config: ExperimentConfig) -> None:
        if self.rendezvous.place.rank == 0:
            super().start(config)

    def end(self, outcome: Outcome) -> Path:
        if outcome.state == RunState.DONE or self.rendezvous.is_first("outcome"):
            return super().end(outcome)
        return self / "state.json"


def meet(place: Place) -> Rendezvous:
    """Return the rendezvous of this rank with the others."""
    requests.in_sweep = True  # what signals all ranks does so several times perhaps
    restarts = launchers.given.get("TORCHELASTIC_RESTART_COUNT", "0")
    if place.rank:
        warnings.simplefilter("ignore")  # rank 0 shows them
        console.quiet = True
    elif restarts != "0":
        console.print(f"A process died. All start again from the last checkpoint, for the {restarts}. time.")
    return Rendezvous(place)


def check_alike(rendezvous: Rendezvous, config: ExperimentConfig) -> None:
    """Raise UserError unless all ranks have one config, one code, one root and a device each."""
    problem = None
    try:
        check_devices(config.trainer)
    except UserError as error:
        problem = str(error)
    options = config.flat()
    ranks = rendezvous.all_gather({"problem": problem, "options": options, "code": provenance.sources(options)})
    for rank, other in enumerate(ranks):
        where = f"rank {rank} of {len(ranks)}"
        if other["problem"]:
            raise UserError(f"{where}: {other['problem']}")
        for name in sorted(options.keys() | other["options"].keys()):
            ours, theirs = (options.get(name) for options in (ranks[0]["options"], other["options"]))
            if ours != theirs:
                why, hint = f"{where} has {typed(theirs)}", "type the same command on all machines"
                raise UserError(option=name, got=ours, why=why, hint=hint)
        if other["code"] != ranks[0]["code"]:
            why, need = f"{where} has other code of kd than rank 0", "the same version of kd on all machines"
            raise UserError(option="kd", why=why, need=need)
    if config.trainer.nodes > 1:
        _check_root(rendezvous, config)


def _check_root(rendezvous: Rendezvous, config: ExperimentConfig) -> None:
    """Raise UserError unless all ranks see the files of rank 0 under the same path."""
    token = None
    if rendezvous.place.rank == 0:
        token = (create_root(config.root) / f".ranks-{uuid.uuid4().hex}").absolute()
        token.touch()
    path = Path(rendezvous.all_gather(str(token))[0])
    deadline = time.monotonic() + VISIBLE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
        os.scandir(path.parent).close() if path.parent.is_dir() else None  # so that a network drive looks again
    seen = rendezvous.all_gather(path.exists())
    if token:
        token.unlink()
    if not all(seen):
        folder = f"{path.parent} on the machine of rank 0 is not the same folder on that of rank {seen.index(False)}"
        raise UserError(
            option="root",
            got=config.root,
            why=folder,
            need="a folder of a file system that all machines share, under the same path",
            hint="type root=/shared/folder" + (", or set KD_CACHE to one" if "://" in config.root else ""),
        )


def work(path: str) -> None:
    """Do the work of a rank that kd/launch/rank_launcher.py started. path: file with the config."""
    from kd.launch.training import train_student

    processes.stand_for(launchers.parent)
    try:
        config = ExperimentConfig.from_dict(json.loads(Path(path).read_text()))
        train_student(config, wait=config.sweep is not None, place=place_of(config.trainer))
    except MISTAKES as error:
        exit_with_error(for_people(error))

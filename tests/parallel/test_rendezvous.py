"""Ranks find each other, whatever is left in the store of their agent, and refuse to work with ranks of another run."""

import json
import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from kd.errors import UserError
from kd.launch import rank_launcher, ranks
from kd.parallel.place import Place, place_of
from kd.parallel.rendezvous import Rendezvous
from kd.runs.outcome import Outcome, RunState
from kd.runs.run import Run
from kd.system import launchers
from kd.system.signals import Preempted, requests
from tests.refusals import refused
from tests.small import small_config

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "one",
            "MASTER_PORT": "7"}  # fmt: skip
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_NODELIST": "gpu[3-4]"}  # fmt: skip


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """Leave the signals of this process as they are."""
    monkeypatch.setattr(requests, "ignore", lambda: None)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def together(server: dist.TCPStore, world_size: int, work) -> list:
    """Call work(rendezvous) of each rank in a thread of its own; return the results, or the errors."""
    results: list = [None] * world_size

    def call(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=30))
        try:
            results[rank] = work(Rendezvous(Place(rank, world_size, rank, "127.0.0.1", server.port), store))
        except (Exception, SystemExit) as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.fixture
def started(monkeypatch):
    """Start this process as launchers do, by the variables that they set."""

    def start(variables: dict[str, str]) -> None:
        monkeypatch.setattr(os, "environ", {**os.environ, **variables})
        launchers.forget_ranks(os.environ)

    yield start
    launchers.given.clear()


def test_values_of_all_ranks_whatever_an_earlier_start_left_in_the_store(server):
    for start in range(3):  # with other values, as an agent starts ranks again on one store
        numbers = together(server, 3, lambda rendezvous, start=start: rendezvous.all_gather(
            10 * start + rendezvous.place.rank
        ))  # fmt: skip
        assert numbers == [[10 * start, 10 * start + 1, 10 * start + 2]] * 3


def test_one_rank_is_the_first(server):
    for _ in range(2):
        first = together(server, 4, lambda rendezvous: rendezvous.is_first("outcome"))
        assert sorted(first) == [False, False, False, True]


def failing(*errors):
    def work(rendezvous: Rendezvous) -> None:
        with rendezvous.one_error():
            rendezvous.all_gather(None)
            if error := errors[rendezvous.place.rank]:
                raise error
            rendezvous.receive("never")

    return work


def test_one_error_is_shown_and_a_mistake_is_not_made_again(server):
    results = together(server, 3, failing(RuntimeError("first"), None, None))
    assert [type(error) for error in results] == [RuntimeError, SystemExit, SystemExit]
    assert [error.code for error in results[1:]] == [1, 1]
    results = together(server, 3, failing(*[UserError("wrong")] * 3))
    assert sorted(type(error).__name__ for error in results) == ["SystemExit", "SystemExit", "UserError"]
    again = together(server, 3, lambda rendezvous: rendezvous.all_gather(0))
    assert [error.code for error in again] == [2, 2, 2]


def test_all_wait_for_the_result_of_rank_0(server):
    order = []

    def work(rendezvous: Rendezvous) -> None:
        if rendezvous.place.rank == 0:
            order.append("result")
        rendezvous.part()
        order.append(rendezvous.place.rank)

    together(server, 3, work)
    assert order[0] == "result" and order[-1] == 0 and sorted(order[1:]) == [0, 1, 2]


@pytest.mark.parametrize("variables, place", [
    (TORCHRUN, Place(3, 4, 1, "one", 7)), (SRUN, Place(3, 4, 1, "gpu3", 19567)),
    (SRUN | {"MASTER_ADDR": "ib3", "MASTER_PORT": "9"}, Place(3, 4, 1, "ib3", 9)),
    ({name: "1" for name in TORCHRUN}, None), (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
])  # fmt: skip
def test_place_is_read_from_the_launcher(tmp_path, started, variables, place):
    started(variables)
    trainer = small_config(tmp_path, "trainer.devices=2", *(["trainer.nodes=2"] if place else [])).trainer
    assert place_of(trainer) == place == place_of(trainer)
    assert not {"RANK", "SLURM_PROCID", "MASTER_ADDR"} & os.environ.keys()


@pytest.mark.parametrize(
    "variables, words, option, fields",
    [
        ({}, ["trainer.nodes=2"], "trainer.nodes", {"why": "only one", "hint": "on each machine"}),
        (TORCHRUN, [], "trainer.devices", {"got": 1, "hint": "trainer.devices=2 trainer.nodes=2"}),
        (TORCHRUN, ["trainer.devices=4"], "trainer.devices", {"why": "torchrun started 4 processes, 2 on each"}),
        (SRUN, ["trainer.devices=3"], "trainer.devices", {"why": "srun started 4 processes, 2 on each machine"}),
        (TORCHRUN, ["trainer.devices=4", "trainer.max_restarts=2"], "trainer.max_restarts", {"hint": "torchrun"}),
    ],
)
def test_other_ranks_than_those_of_the_run_are_refused(tmp_path, started, variables, words, option, fields):
    started(variables)
    with refused(option=option, **fields):
        place_of(small_config(tmp_path, *words).trainer)


def test_a_task_of_slurm_alone_is_a_run_of_its_own(tmp_path, started):
    """Tasks of one srun that each do another run."""
    started(SRUN)
    assert place_of(small_config(tmp_path).trainer) is None


@pytest.mark.parametrize(
    "words, option, fields",
    [
        (["trainer.nodes=3", "trainer.devices=2"], "devices", {"hint": "trainer.devices=1, or trainer.batch=6"}),
        (["trainer.nodes=2", "logits=none", "record=top_k"], "devices", {"hint": "trainer.devices=1 trainer.nodes=1"}),
        (["trainer.max_restarts=1"], "max_restarts", {"conflict": "trainer.devices=1"}),
        (
            ["trainer.max_restarts=1", "trainer.nodes=2"],
            "max_restarts",
            {"conflict": "trainer.nodes=2", "hint": "torchrun --max-restarts=1"},
        ),
        (["trainer.strategy=fsdp", "trainer.nodes=2", "trainer.batch=5"], "strategy", {"hint": "trainer.batch=4"}),
    ],
)
def test_rules(tmp_path, words, option, fields):
    with refused(option=f"trainer.{option}", **fields):
        small_config(tmp_path, *words)


def alike(*configs):
    return lambda rendezvous: ranks.check_alike(rendezvous, configs[rendezvous.place.rank])


def test_other_words_on_another_machine_are_refused_on_all(tmp_path, server):
    words = ("trainer.nodes=2", "trainer.devices=1", "logits=none", "teacher=none")
    one, other = (small_config(tmp_path, *words, f"seed={seed}") for seed in range(2))
    assert together(server, 2, alike(one, one)) == [None, None]
    for error in together(server, 2, alike(one, other)):
        assert (error.option, error.got, error.why) == ("seed", 0, "rank 1 of 2 has 1")
    assert not list(tmp_path.glob(".ranks*"))


def test_other_code_on_another_machine_is_refused(tmp_path, server, monkeypatch):
    config = small_config(tmp_path, "trainer.nodes=2", "logits=none", "teacher=none")
    codes = iter(({"loss": {"fkl": "a"}}, {"loss": {"fkl": "b"}}))
    monkeypatch.setattr(ranks.provenance, "sources", lambda options: next(codes))
    assert [error.option for error in together(server, 2, alike(config, config))] == ["kd", "kd"]


def test_too_few_devices_of_another_machine_are_refused(tmp_path, server, monkeypatch):
    def check(trainer) -> None:
        if threading.current_thread() is last:
            raise UserError(option="trainer.devices", got=1, why="this machine has 0")

    def work(rendezvous: Rendezvous) -> None:
        nonlocal last
        last = threading.current_thread() if rendezvous.place.rank else last
        ranks.check_alike(rendezvous, config)

    last = None
    config = small_config(tmp_path, "trainer.nodes=2", "logits=none", "teacher=none")
    monkeypatch.setattr(ranks, "check_devices", check)
    for error in together(server, 2, work):
        assert str(error) == "rank 1 of 2: trainer.devices=1: this machine has 0."


class Elsewhere:
    """Rendezvous of rank 0 with a rank whose root is another folder."""

    place = Place(0, 2, 0, "", 0)

    def all_gather(self, value):
        return [value, False if value is True else None]


@pytest.mark.parametrize("root, hint", [("runs", "type root="), ("memory://bucket", "KD_CACHE")])
def test_root_that_is_not_shared_is_refused(tmp_path, monkeypatch, root, hint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    config = small_config(tmp_path, "trainer.nodes=2", "logits=none", "teacher=none").derive(root=root)
    with refused(option="root", got=root, need="all machines share", hint=hint):
        ranks._check_root(Elsewhere(), config)
    assert not list(tmp_path.rglob(".ranks*"))


def failure(code: int, second: int, message: str = "") -> ProcessFailure:
    failed = ProcessFailure(0, 1, code, "")
    failed.timestamp = second
    if message:
        failed.message = {"message": message, "extraInfo": {"py_callstack": f"Traceback: {message}\n"}}
    return failed


@pytest.mark.parametrize(
    "failures, recorded, state, reason",
    [
        (
            {0: failure(1, 5, "Connection closed"), 1: failure(-9, 5)},
            "failed",
            "failed",
            "rank 1 of 3: killed by SIGKILL",
        ),
        ({0: failure(1, 5, "RuntimeError: no"), 1: failure(-9, 35)}, "", "failed", "RuntimeError: no"),
        (
            {0: failure(1, 5, "RuntimeError: no"), 1: failure(143, 5)},
            "out of memory",
            "out of memory",
            "RuntimeError: no",
        ),
        ({2: failure(7, 5), 1: failure(-15, 5)}, "", "failed", "rank 2 of 3 ended with exit code 7"),
    ],
)
def test_rank_that_failed_first_is_recorded(tmp_path, capsys, failures, recorded, state, reason):
    run = Run(tmp_path, "run")
    if recorded:
        run.end(Outcome(RunState(recorded), "of a rank"))
    with refused(option="run", why=reason, hint="the same command"):
        rank_launcher._fail(run, failures, 3, False)
    assert json.loads((run / "state.json").read_text())["state"] == state
    assert ("Traceback" in capsys.readouterr().err) == ("RuntimeError" in reason)


def test_ends_that_need_no_report(tmp_path):
    with pytest.raises(SystemExit) as end:
        rank_launcher._fail(Run(tmp_path, "run"), {0: failure(2, 5), 1: failure(143, 5)}, 2, False)
    assert end.value.code == 2  # the rank has printed its mistake
    with pytest.raises(Preempted):
        rank_launcher._fail(Run(tmp_path, "run"), {0: failure(143, 5), 1: failure(-15, 6)}, 2, False)
    assert not list(Path(tmp_path).rglob("*.json"))

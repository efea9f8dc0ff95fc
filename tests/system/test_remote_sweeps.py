"""Sweeps whose root is a URL: outages, and copies of one sweep that share its runs."""

import io
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from kd.launch import cluster
from kd.launch.job import Job
from kd.launch.local import LocalPool
from kd.launch.summary import summary
from kd.runs.run import Run
from kd.system import remote, retries
from kd.system.processes import process_info
from tests.small import FORK
from tests.system.away import Away

PROGRAM = """
import json, sys, time
from pathlib import Path

run, seconds = Path(sys.argv[1]), float(sys.argv[2])
print("begins", flush=True)
time.sleep(seconds)
run.mkdir(parents=True, exist_ok=True)
result = {"final": {"val/lm": 1.0}, "seconds": seconds, "config": {}, "environment": {}}
(run / "result.json").write_text(json.dumps(result))
"""


def jobs_at(root: str, folder: Path, *seconds: float) -> list[Job]:
    (folder / "program.py").write_text(PROGRAM)
    return [
        Job(Run(root, f"run{n}"), [str(folder / "there" / f"run{n}"), str(s)], f"{n}") for n, s in enumerate(seconds)
    ]


def test_an_outage_at_the_end_of_a_run_ends_no_other_and_stops_no_sweep(away, tmp_path, monkeypatch, capsys):
    jobs = jobs_at(away, tmp_path, 0.2, 2.5, 0.2, 0.2)
    pool = LocalPool(str(tmp_path / "program.py"), jobs, 2, [])
    real = pool.over

    def over():
        ended = real()
        if ended and not Away.until:
            Away.go(1.5)
        return ended

    pool.over = over
    pool.work()
    assert [job.state["state"] for job in jobs] == ["done"] * 4
    table = Console(file=io.StringIO(), width=200)
    table.print(summary("s", jobs))
    assert table.file.getvalue().count("done") == 4


def test_a_run_whose_end_cannot_be_read_is_unknown_and_the_table_says_so(away, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "PATIENCE", 0.3)
    jobs = jobs_at(away, tmp_path, 0.1, 0.1)
    pool = LocalPool(str(tmp_path / "program.py"), jobs, 2, [])
    Away.go(1000)
    pool.work()
    table = Console(file=io.StringIO(), width=200)
    table.print(summary("s", jobs))
    assert table.file.getvalue().count("unknown") == 2 and "could not be read" in table.file.getvalue()


def test_a_run_that_another_machine_did_meanwhile_is_done(away, tmp_path):
    (job,) = jobs_at(away, tmp_path, 0.2)
    job.run.remote.write("state.json", {"state": "running", **process_info()})  # of a process other than the job's
    LocalPool(str(tmp_path / "program.py"), [job], 1, []).work()
    assert job.state["state"] == "done"


def test_a_table_has_runs_whose_url_is_away_after_they_were_done(away, tmp_path):
    (job,) = jobs_at(away, tmp_path, 0)
    job.state = {"state": "done", "reason": ""}
    Away.go(1000)
    table = Console(file=io.StringIO(), width=200)
    table.print(summary("s", [job]))
    assert "done" in table.file.getvalue()


def test_a_scheduler_is_not_taken_at_its_word_while_the_url_is_away(away, tmp_path, monkeypatch):
    """The run may have said itself what became of it."""
    monkeypatch.setattr(cluster, "SETTLE", 0.2)
    monkeypatch.setattr(remote, "ASK_AGAIN", 0)
    (job,) = jobs_at(away, tmp_path, 0)
    pool = cluster.ClusterPool("", [job], 1)
    pool.submit(job)
    pool.submitted(job).why = ("failed", "SLURM says COMPLETED")
    Away.go(0.6)
    began = time.monotonic()
    while not pool.over():
        assert time.monotonic() - began < 5
        if time.monotonic() - began > 0.4:
            remote_run = tmp_path / "there" / "run0"
            remote_run.mkdir(parents=True, exist_ok=True)
            (remote_run / "result.json").write_text("{}")
    assert time.monotonic() - began > 0.5 and job.run.state()["state"] == "done"


def copy_of_a_sweep(root: str, folder: Path, count: int) -> None:
    jobs = jobs_at(root, folder, *[0.7] * count)
    LocalPool(str(folder / "program.py"), jobs, 1, []).work()


@pytest.mark.parametrize("url", [False, True])
def test_two_copies_of_a_sweep_share_its_runs(cache, tmp_path, url):
    root = f"file://{tmp_path}/there" if url else str(tmp_path / "there")
    both = [FORK.Process(target=copy_of_a_sweep, args=(root, tmp_path, 6)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    logs = [path.read_text() for path in sorted((cache if url else tmp_path).rglob("log.txt"))]
    # In lockstep it would be 12. Each copy may begin the last run of the other, when it has nothing else.
    assert len(logs) == 6 and sum(log.count("begins") for log in logs) <= 8
    assert not list(tmp_path.rglob("claim.lock"))


def test_a_claim_of_a_process_that_is_gone_is_none(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    run = Run(tmp_path, "run")
    assert run.claim.take() and run.claim.take()
    (run / "claim.lock").write_text(json.dumps(process_info() | {"pid": os.getppid()}))
    assert not run.claim.take()
    (run / "claim.lock").write_text(json.dumps(process_info() | {"pid": gone.pid}))
    assert run.claim.take()
    run.claim.release()
    assert not (run / "claim.lock").exists()

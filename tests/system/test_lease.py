"""Machines that work on one run take turns."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from kd.system import retries
from kd.system.lease import lease
from kd.system.processes import boot_id, is_alive, process_info
from kd.system.remote import Remote
from tests.refusals import refused
from tests.small import start
from tests.system.away import Away


def other(**about) -> dict:
    return process_info() | {"host": "elsewhere", "id": "other", "beat": 0} | about


def held(tmp_path: Path, lease: dict) -> Remote:
    run = Remote(f"file://{tmp_path}/run", tmp_path / "copy")
    run.write("lease.json", lease)
    return run


def test_a_machine_that_is_gone_is_followed_and_one_that_is_there_is_not(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("kd.system.lease.EXPIRES", 0.5)
    with lease(held(tmp_path, other()), process_info(), is_alive, patient=False):  # it says nothing for so long
        written = json.loads((tmp_path / "run" / "lease.json").read_text())
        assert written["pid"] == os.getpid()
    assert not (tmp_path / "run" / "lease.json").exists()
    monkeypatch.setattr("kd.system.lease.EXPIRES", 100)
    gone = subprocess.Popen(["true"])
    gone.wait()
    began = time.monotonic()
    run = held(tmp_path, process_info() | {"pid": gone.pid, "id": "x", "beat": 0})
    with lease(run, process_info(), is_alive, patient=False):
        assert time.monotonic() - began < 5
    with (
        refused(why=f"being worked on by process {os.getpid()}", hint="wait for that process to end"),
        lease(
            held(tmp_path, process_info() | {"id": "x", "beat": 0, "boot": boot_id()}), process_info(), is_alive, False
        ),
    ):
        raise AssertionError


@pytest.mark.slow
def test_two_machines_do_one_run_once(remote_root, cache, tmp_path):
    url, environments = f"root=file://{remote_root}", [{"KD_CACHE": str(tmp_path / name)} for name in "ab"]
    both = [start(tmp_path, "-m", url, "seed=0,1", **e) for e in environments]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    logs = [log.read_text() for name in "ab" for log in (tmp_path / name).rglob("fkl*/log.txt")]
    assert sum("step 12/12" in log for log in logs) == 2, logs


def test_no_lease_is_taken_over_for_an_outage(away, tmp_path, monkeypatch):
    """Keep the holder's lease through an outage, as the holder could not renew it either."""
    monkeypatch.setattr("kd.system.lease.EXPIRES", 0.6)
    monkeypatch.setattr(retries, "RENEWED", 0.3)
    run = Remote(f"{away}/run", tmp_path / "copy")
    run.write("lease.json", other())
    real, reads = Remote.read, []

    def read(self, *args):
        reads.append(time.monotonic())
        if len(reads) == 2:
            Away.go(1)
        if len(reads) == 4:  # it has been away, and the holder comes back
            self.write("lease.json", other(beat=1))
        if len(reads) > 5:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Remote, "read", read)
    with pytest.raises(KeyboardInterrupt), lease(run, process_info(), is_alive, patient=True):
        raise AssertionError
    assert real(run, "lease.json")["id"] == "other"


def test_a_lease_whose_writing_was_not_answered_is_ones_own(away, tmp_path, monkeypatch):
    real = Remote.create

    def create(self, *args):
        real(self, *args)
        return False

    monkeypatch.setattr(Remote, "create", create)
    with lease(Remote(f"{away}/run", tmp_path / "copy"), process_info(), is_alive, patient=False):
        pass

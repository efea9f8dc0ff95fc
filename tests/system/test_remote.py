"""A root under a URL: what counts is there, and a machine that is lost loses nothing that had arrived."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console

from kd.launch import cluster
from kd.launch.job import Job
from kd.launch.local import LocalPool
from kd.launch.summary import summary
from kd.runs.run import Run
from kd.system import files, remote, retries
from kd.system.lease import lease
from kd.system.processes import boot_id, is_alive, process_info
from kd.system.remote import Remote
from kd.system.remote_checkpoints import RemoteCheckpoints
from tests.refusals import refused
from tests.small import (
    ENVIRONMENT,
    FORK,
    TRAIN,
    folder,
    here,
    listed,
    outcome,
    shared,
    small_config,
    start,
    train,
)


class Broken(LocalFileSystem):
    """A folder that refuses to be written to, as an object store may."""

    protocol = "broken"
    refuses = lambda path: False  # noqa: E731

    def put_file(self, path1, path2, **kwargs):
        if type(self).refuses(path2):
            raise PermissionError("403 Forbidden")
        super().put_file(path1, path2, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("broken://"))


fsspec.register_implementation("broken", Broken, clobber=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A root on a disk with a run that nothing disturbed, and its teacher."""
    return shared(tmp_path_factory, "undisturbed", train)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENVIRONMENT, "KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kd.system.lease.SETTLES", 0.1)
    monkeypatch.setattr("kd.system.lease.POLL", 0.1)
    return tmp_path / "cache"


@pytest.fixture
def remote_root(whole, cache, tmp_path) -> Path:
    """A folder that is a URL to kd, with the teacher in it."""
    shutil.copytree(whole, tmp_path / "there", ignore=shutil.ignore_patterns("fkl*", "data", ".*"))
    return tmp_path / "there"


def killed_after(process: subprocess.Popen, path: Path, step: int) -> None:
    """End it with SIGKILL once the checkpoint of this step is whole at the URL."""
    deadline = time.monotonic() + 120
    while not list(path.glob(f"fkl*/checkpoints/step-{step:08}.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_machine_that_is_lost_is_followed_by_another_bit_for_bit(whole, remote_root, cache, tmp_path):
    url = f"root=file://{remote_root}"
    killed_after(start(tmp_path, url, "trainer.steps=12"), remote_root, 6)
    assert not list(remote_root.glob("fkl*/result.json"))
    metrics = folder(remote_root, "fkl") / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:100])  # where it is cut off as it is copied: a view, nothing more
    shutil.rmtree(cache)
    output = train(tmp_path, url)
    assert "step 1/12" not in output and "step 12/12" in output and f"All of it: file://{remote_root}" in output
    assert outcome(folder(remote_root, "fkl")) == outcome(folder(whole, "fkl"))
    assert not (folder(remote_root, "fkl") / "checkpoints").exists() and not list(remote_root.rglob("lease.json"))
    run = Run(f"file://{remote_root}", folder(remote_root, "fkl").name)
    assert (
        run.state()["state"] == "done"
        and json.loads((remote_root / run.name / "state.json").read_text())["exit_code"] == 0
    )
    shutil.rmtree(cache)
    assert "step " not in train(tmp_path, url)  # its result is read from there


def pushed(remote_root: Path, cache: Path) -> tuple[Remote, Path]:
    """A run of two checkpoints at a URL."""
    run = Remote(f"file://{remote_root}/run", cache / "run")
    (cache / "run" / "checkpoints").mkdir(parents=True)
    for step in (3, 6, 9):
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": s}) + "\n" for s in range(step - 2, step + 1))
        path = run.folder / "checkpoints" / f"step-{step:08}.ckpt"
        path.write_bytes(bytes([step]) * 99)
        path.with_suffix(".xxh3").write_text("digest")
        copies = RemoteCheckpoints(run)
        copies.send(path, None, None)
        copies.finish_sending()
    shutil.rmtree(cache)
    return run, remote_root / "run" / "checkpoints"


def test_checkpoint_and_metrics_belong_together_and_a_damaged_one_is_passed_over(cache, tmp_path):
    run, objects = pushed(tmp_path / "there", cache)
    assert sorted(p.name for p in objects.glob("*.json")) == ["step-00000006.json", "step-00000009.json"]
    assert len(list(objects.iterdir())) == 6
    assert RemoteCheckpoints(run).pull(-1)
    assert [json.loads(x)["step"] for x in open(run.folder / "metrics.jsonl")] == list(range(1, 10))
    assert not RemoteCheckpoints(run).pull(9)  # as far as what is here
    shutil.rmtree(cache)
    (objects / "step-00000009.ckpt").write_bytes(b"\x09" * 98 + b"\x08")
    with pytest.warns(UserWarning, match="step-00000009.json is of a damaged checkpoint"):
        assert RemoteCheckpoints(run).pull(-1)
    assert [json.loads(x)["step"] for x in open(run.folder / "metrics.jsonl")] == list(range(1, 7))
    (objects / "step-00000006.jsonl").unlink()
    damaged = "step-00000009.json, checkpoints/step-00000006.json"
    with pytest.warns(UserWarning), refused(option=run.url, why=damaged, hint=f"remove {run.url}/checkpoints"):
        RemoteCheckpoints(run).pull(-1)


@pytest.mark.parametrize("name", ["../evil", "checkpoints/../../evil", "{root}/evil"])
def test_a_note_that_names_another_place_is_refused(cache, tmp_path, name):
    run, objects = pushed(tmp_path / "there", cache)
    (tmp_path / "there" / "evil").write_text("evil")
    (objects / "step-00000099.json").write_text(json.dumps({"files": {name.format(root=tmp_path): ""}, "digest": ""}))
    with refused(option=run.url, why="evil; nothing was copied"):
        RemoteCheckpoints(run).pull(-1)
    assert [p for p in tmp_path.rglob("evil") if p.parent != tmp_path / "there"] == []


def test_checkpoint_in_shards_is_a_folder_there_too(cache, tmp_path):
    run = Remote(f"file://{tmp_path}/there", cache / "run")
    path = run.folder / "checkpoints" / "step-00000003.ckpt"
    path.mkdir(parents=True)
    for name in ("meta.pt", "__0_0.distcp", ".metadata"):
        (path / name).write_text(name)
    path.with_suffix(".xxh3").write_text("digest")
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n')
    copies = RemoteCheckpoints(run)
    copies.send(path, None, None)
    copies.finish_sending()
    shutil.rmtree(cache)
    assert RemoteCheckpoints(run).pull(-1) and sorted(p.name for p in path.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "meta.pt",
    ]


def test_a_copy_that_fails_is_said_and_made_up_for(remote_root, cache, monkeypatch, recwarn):
    root = f"broken://{remote_root}"
    monkeypatch.setattr(Broken, "refuses", lambda path: "step-00000003" in path)
    here(cache.parent, f"root={root}", "teacher=none", "logits=none", "seed=5")
    assert any("no access (403 Forbidden)" in str(w.message) and "here alone" in str(w.message) for w in recwarn)
    monkeypatch.setattr(Broken, "refuses", lambda path: "student" in path)
    with refused(why="no access (403 Forbidden", hint="credentials"):
        here(cache.parent, f"root={root}", "teacher=none", "logits=none", "seed=6")
    (name,) = (
        p.name for p in remote_root.iterdir() if (p / "state.json").exists() and not (p / "result.json").exists()
    )
    run = Run(root, name)
    assert run.state()["state"] == "failed" and run.result() is None
    monkeypatch.setattr(Broken, "refuses", lambda path: False)
    here(cache.parent, f"root={root}", "teacher=none", "logits=none", "seed=6")
    assert Run(root, run.name).result()["weights"] == run.weights()


def test_what_is_recorded_goes_on_on_another_machine(cache, tmp_path):
    words = ("teacher=none", "logits=none", "record=top_k", "record.k=5", "trainer.steps=12")
    undisturbed = here(tmp_path / "whole", *words)
    remote_root = tmp_path / "there"
    url = f"root=file://{remote_root}"
    from kd.training.module import DistillationModule

    real = DistillationModule.training_step

    def step(self, batch, index):
        if self.global_step == 8:
            raise RuntimeError("injected")
        return real(self, batch, index)

    DistillationModule.training_step = step
    try:
        with pytest.raises(RuntimeError, match="injected"):
            here(tmp_path, url, *words)
    finally:
        DistillationModule.training_step = real
    shutil.rmtree(cache)
    run = here(tmp_path, url, *words)
    assert outcome(remote_root / run.name) == outcome(undisturbed)
    stores = [next((root / "stores").glob("*/manifest.json")).parent for root in (tmp_path / "whole", remote_root)]
    whole, other = [json.loads((s / "manifest.json").read_text())["files"] for s in stores]
    assert whole == other


@pytest.mark.slow
def test_sweep_and_report_at_a_url(remote_root, cache, tmp_path):
    url = f"file://{remote_root}"
    train(tmp_path, "-m", f"root={url}", "seed=0,1", "trainer.steps=3")
    assert len(json.loads(listed(remote_root).read_text())["runs"]) == 2
    shutil.rmtree(cache)
    again = train(tmp_path, "-m", f"root={url}", "seed=0,1", "trainer.steps=3")
    assert again.count("done before") == 2
    shutil.rmtree(cache)
    name = listed(remote_root).stem
    command = [sys.executable, "-m", "sweeps.report", name, "--root", url]
    reported = subprocess.run(command, env=ENVIRONMENT, cwd=TRAIN.parent, capture_output=True, text=True)
    assert reported.returncode == 0 and "2 seeds" in reported.stdout, reported.stderr
    assert name in (remote_root / "sweeps" / f"{name}.html").read_text()


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


@pytest.mark.parametrize(
    "root, why",
    [
        ("nosuch://bucket/kd", "nosuch"),
        ("s3://name:hunter22@bucket/kd", "there seems to be a secret in it"),
        ("https://host/kd?X-Amz-Signature=hunter22", "there seems to be a secret in it"),
    ],
)
def test_urls_that_cannot_be(cache, tmp_path, root, why):
    with refused(why=why) as error:
        here(tmp_path, f"root='{root}'")
    assert "hunter22" not in str(error.value)
    assert not cache.exists() or not any(b"hunter22" in p.read_bytes() for p in cache.rglob("*") if p.is_file())


def test_a_folder_is_no_url(tmp_path):
    config = small_config(tmp_path)
    assert remote.local_root(config.root) == tmp_path and Run(tmp_path, "x").remote is None


class Away(LocalFileSystem):
    """A folder behind a network that is gone until a time."""

    protocol = "away"
    until = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("away://"))

    @classmethod
    def go(cls, seconds: float) -> None:
        cls.until = time.monotonic() + seconds


def _fails_while_away(name: str):
    def method(self, *args, **kwargs):
        if time.monotonic() < Away.until:
            raise OSError("the network is gone")
        return getattr(LocalFileSystem, name)(self, *args, **kwargs)

    return method


for name in ("cat_file", "get_file", "put_file", "pipe_file", "find", "exists", "rm", "makedirs"):
    setattr(Away, name, _fails_while_away(name))
fsspec.register_implementation("away", Away, clobber=True)


@pytest.fixture
def away(cache, monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(retries, "PAUSES", (0.05, 0.1))
    monkeypatch.setattr(Away, "until", 0.0)
    retries._outages.clear()
    return f"away://{tmp_path}/there"


@pytest.mark.parametrize(
    "ask",
    [
        lambda remote: remote.write("other.json", {"a": 1}),
        lambda remote: remote.read("one.json")["a"] == 1,
        lambda remote: remote.get("one.json"),
        lambda remote: remote.names() == ["one.json"],
        lambda remote: remote.put("one.json"),
        lambda remote: remote.create("two.json", {}),
        lambda remote: remote.remove("one.json"),
    ],
)
def test_what_is_asked_of_a_url_that_is_away_is_asked_again(away, tmp_path, capsys, ask):
    remote = Remote(away, tmp_path / "copy")
    remote.write("one.json", {"a": 1})
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "one.json").write_text('{"a": 1}')
    Away.go(0.4)
    assert ask(remote) in (None, True)
    message = " ".join(capsys.readouterr().err.split())
    assert (
        message.count("(OSError: the network is gone). It is tried again for 10:00.") == 1
        and "answers again" in message
    )


def test_a_url_is_asked_once_where_nothing_waits_and_not_for_ever(away, tmp_path, monkeypatch):
    remote = Remote(away, tmp_path / "copy")
    Away.go(1000)
    for wait, least, most in ((0, 0, 0.3), (0.5, 0.3, 1.5), (None, 0, 0.3)):  # the last one, as it was away so long
        monkeypatch.setattr(retries, "PATIENCE", 0.4)
        began = time.monotonic()
        with pytest.raises(retries.Unreachable, match=r"could not be read"):
            remote.read("one.json", wait)
        assert least <= time.monotonic() - began < most


def test_what_can_never_be_written_is_given_up_although_the_rest_is_reached(away, tmp_path, monkeypatch):
    remote = Remote(away, tmp_path / "copy")
    monkeypatch.setattr(retries, "PATIENCE", 0.5)

    def too_large() -> None:
        remote.write("small.json", {})
        raise OSError("too large")

    with pytest.raises(retries.Unreachable, match="too large"):
        retries.patiently(away, "written", too_large)


def test_a_run_that_ends_while_its_url_is_away_is_done(away, tmp_path):
    words = ("teacher=none", "logits=none", f"root={away}")
    real = Run.finish

    def finish(self, result):
        Away.go(1)
        real(self, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", finish)
        run = here(tmp_path, *words)
    assert json.loads((tmp_path / "there" / run.name / "result.json").read_text())["state"] == "done"
    assert json.loads((tmp_path / "there" / run.name / "state.json").read_text())["state"] == "done"
    assert not (tmp_path / "there" / run.name / "checkpoints").exists()


def test_why_a_run_failed_is_not_lost_in_an_outage(away, tmp_path, monkeypatch):
    run = Run(away, "run")
    run.folder.mkdir(parents=True)
    monkeypatch.setattr(retries, "SOON", 0)
    run.start(small_config(tmp_path))
    Away.go(1000)
    with pytest.warns(UserWarning), pytest.raises(ZeroDivisionError), run.records_failure():
        1 / 0  # noqa: B018
    assert json.loads((run / "state.json").read_text())["reason"] == "ZeroDivisionError: division by zero"


def test_training_does_not_wait_for_a_checkpoint_to_arrive_and_the_next_one_makes_up_for_it(away, tmp_path):
    run = Remote(f"{away}/run", tmp_path / "copy")
    copies = RemoteCheckpoints(run)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n')
    began = time.monotonic()
    for step, seconds in ((3, 0.2), (6, 0)):
        path = run.folder / "checkpoints" / f"step-{step:08}.ckpt"
        path.write_bytes(b"x")
        path.with_suffix(".xxh3").write_text("digest")
        Away.go(seconds)
        copies.send(path, None, None)
        if step == 3:
            with pytest.warns(UserWarning, match="the next one is copied again"):
                copies.finish_sending()
            assert time.monotonic() - began < 0.2
            time.sleep(0.25)
    copies.finish_sending()
    assert "checkpoints/step-00000006.json" in run.names()


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


@pytest.mark.parametrize("url", [False, True])
def test_result_and_state_agree_while_the_run_ends(cache, tmp_path, monkeypatch, url):
    run = Run(f"file://{tmp_path}/there" if url else tmp_path / "there", "run0")
    real = Run.result

    def result(self, wait=None):
        monkeypatch.setattr(Run, "result", real)
        read = real(self, wait)
        written = tmp_path / "there" / "run0"
        files.write_json(written / "result.json", {"seconds": 1.0, "config": {}, "environment": {}, "final": {}})
        files.write_json(written / "state.json", {"state": "done"})
        return read

    monkeypatch.setattr(Run, "result", result)
    record, state = run.result_and_state()
    assert record["seconds"] == state["seconds"] == 1 and state["state"] == "done"
    (tmp_path / "there" / "run0" / "result.json").unlink()
    run.forget()
    assert run.result_and_state()[0] is None and run.state()["state"] == "not begun"


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

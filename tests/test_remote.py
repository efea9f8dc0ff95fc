"""A root under a URL: what counts is there, and a machine that is lost loses nothing that had arrived."""

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

from kd import remote
from kd.errors import UserError
from kd.remote import Remote
from kd.run import Run, alive, boot, whereabouts
from tests.small import ENVIRONMENT, TRAIN, folder, here, listed, outcome, settings, start, train


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
    root = tmp_path_factory.mktemp("whole")
    train(root)
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENVIRONMENT, "KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "SETTLES", 0.1)
    monkeypatch.setattr(remote, "POLL", 0.1)
    return tmp_path / "cache"


@pytest.fixture
def there(whole, cache, tmp_path) -> Path:
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
def test_a_machine_that_is_lost_is_followed_by_another_bit_for_bit(whole, there, cache, tmp_path):
    url = f"root=file://{there}"
    killed_after(start(tmp_path, url, "trainer.steps=12"), there, 6)
    assert not list(there.glob("fkl*/result.json"))
    metrics = folder(there, "fkl") / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:100])  # where it is cut off as it is copied: a view, nothing more
    shutil.rmtree(cache)
    output = train(tmp_path, url)
    assert "step 1/12" not in output and "step 12/12" in output and f"All of it: file://{there}" in output
    assert outcome(folder(there, "fkl")) == outcome(folder(whole, "fkl"))
    assert not (folder(there, "fkl") / "checkpoints").exists() and not list(there.rglob("lease.json"))
    run = Run(f"file://{there}", folder(there, "fkl").name)
    assert (
        run.state()["state"] == "done" and json.loads((there / run.name / "state.json").read_text())["exit_code"] == 0
    )
    shutil.rmtree(cache)
    assert "step " not in train(tmp_path, url)  # its result is read from there


def pushed(there: Path, cache: Path) -> tuple[Remote, Path]:
    """A run of two checkpoints at a URL."""
    run = Remote(f"file://{there}/run", cache / "run")
    (cache / "run" / "checkpoints").mkdir(parents=True)
    for step in (3, 6, 9):
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": s}) + "\n" for s in range(step - 2, step + 1))
        path = run.folder / "checkpoints" / f"step-{step:08}.ckpt"
        path.write_bytes(bytes([step]) * 99)
        path.with_suffix(".xxh3").write_text("digest")
        run.send_checkpoint(path, None, None)
        run.finish_sending()
    shutil.rmtree(cache)
    return run, there / "run" / "checkpoints"


def test_checkpoint_and_metrics_belong_together_and_a_damaged_one_is_passed_over(cache, tmp_path):
    run, objects = pushed(tmp_path / "there", cache)
    assert sorted(p.name for p in objects.glob("*.json")) == ["step-00000006.json", "step-00000009.json"]
    assert len(list(objects.iterdir())) == 6
    assert run.pull_checkpoint(-1)
    assert [json.loads(x)["step"] for x in open(run.folder / "metrics.jsonl")] == list(range(1, 10))
    assert not run.pull_checkpoint(9)  # as far as what is here
    shutil.rmtree(cache)
    (objects / "step-00000009.ckpt").write_bytes(b"\x09" * 98 + b"\x08")
    with pytest.warns(UserWarning, match="step-00000009.json is of a damaged checkpoint"):
        assert run.pull_checkpoint(-1)
    assert [json.loads(x)["step"] for x in open(run.folder / "metrics.jsonl")] == list(range(1, 7))
    (objects / "step-00000006.jsonl").unlink()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="Every checkpoint of this run is damaged"):
        run.pull_checkpoint(-1)


@pytest.mark.parametrize("name", ["../evil", "checkpoints/../../evil", "{root}/evil"])
def test_a_note_that_names_another_place_is_refused(cache, tmp_path, name):
    run, objects = pushed(tmp_path / "there", cache)
    (tmp_path / "there" / "evil").write_text("evil")
    (objects / "step-00000099.json").write_text(json.dumps({"files": {name.format(root=tmp_path): ""}, "digest": ""}))
    with pytest.raises(UserError, match="evil; nothing was copied"):
        run.pull_checkpoint(-1)
    assert [p for p in tmp_path.rglob("evil") if p.parent != tmp_path / "there"] == []


def test_checkpoint_in_shards_is_a_folder_there_too(cache, tmp_path):
    run = Remote(f"file://{tmp_path}/there", cache / "run")
    path = run.folder / "checkpoints" / "step-00000003.ckpt"
    path.mkdir(parents=True)
    for name in ("meta.pt", "__0_0.distcp", ".metadata"):
        (path / name).write_text(name)
    path.with_suffix(".xxh3").write_text("digest")
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n')
    run.send_checkpoint(path, None, None)
    run.finish_sending()
    shutil.rmtree(cache)
    assert run.pull_checkpoint(-1) and sorted(p.name for p in path.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "meta.pt",
    ]


def test_a_copy_that_fails_is_said_and_made_up_for(there, cache, monkeypatch, recwarn):
    root = f"broken://{there}"
    monkeypatch.setattr(Broken, "refuses", lambda path: "step-00000003" in path)
    here(cache.parent, f"root={root}", "teacher=none", "logits=none", "seed=5")
    assert any("no access (403 Forbidden)" in str(w.message) and "here alone" in str(w.message) for w in recwarn)
    monkeypatch.setattr(Broken, "refuses", lambda path: "student" in path)
    with pytest.raises(UserError, match=r"no access .403 Forbidden"):
        here(cache.parent, f"root={root}", "teacher=none", "logits=none", "seed=6")
    (name,) = (p.name for p in there.iterdir() if (p / "state.json").exists() and not (p / "result.json").exists())
    made = Run(root, name)
    assert made.state()["state"] == "failed" and made.result() is None
    monkeypatch.setattr(Broken, "refuses", lambda path: False)
    here(cache.parent, f"root={root}", "teacher=none", "logits=none", "seed=6")
    assert Run(root, made.name).result()["weights"] == made.weights()


def test_what_is_recorded_goes_on_on_another_machine(cache, tmp_path):
    words = ("teacher=none", "logits=none", "record=top_k", "record.k=5", "trainer.steps=12")
    undisturbed = here(tmp_path / "whole", *words)
    there = tmp_path / "there"
    url = f"root=file://{there}"
    from kd.module import Distillation

    real = Distillation.training_step

    def step(self, batch, index):
        if self.global_step == 8:
            raise RuntimeError("injected")
        return real(self, batch, index)

    Distillation.training_step = step
    try:
        with pytest.raises(RuntimeError, match="injected"):
            here(tmp_path, url, *words)
    finally:
        Distillation.training_step = real
    shutil.rmtree(cache)
    made = here(tmp_path, url, *words)
    assert outcome(there / made.name) == outcome(undisturbed)
    stores = [next((root / "stores").glob("*/manifest.json")).parent for root in (tmp_path / "whole", there)]
    whole, other = [json.loads((s / "manifest.json").read_text())["files"] for s in stores]
    assert whole == other


@pytest.mark.slow
def test_sweep_and_report_at_a_url(there, cache, tmp_path):
    url = f"file://{there}"
    train(tmp_path, "-m", f"root={url}", "seed=0,1", "trainer.steps=3")
    assert len(json.loads(listed(there).read_text())["runs"]) == 2
    shutil.rmtree(cache)
    again = train(tmp_path, "-m", f"root={url}", "seed=0,1", "trainer.steps=3")
    assert again.count("done before") == 2
    shutil.rmtree(cache)
    name = listed(there).stem
    command = [sys.executable, "-m", "sweeps.report", name, "--root", url]
    said = subprocess.run(command, env=ENVIRONMENT, cwd=TRAIN.parent, capture_output=True, text=True)
    assert said.returncode == 0 and "2 seeds" in said.stdout, said.stderr
    assert name in (there / "sweeps" / f"{name}.html").read_text()


def other(**about) -> dict:
    return whereabouts() | {"host": "elsewhere", "id": "other", "beat": 0} | about


def held(tmp_path: Path, lease: dict) -> Remote:
    run = Remote(f"file://{tmp_path}/run", tmp_path / "copy")
    run.write("lease.json", lease)
    return run


def test_a_machine_that_is_gone_is_followed_and_one_that_is_there_is_not(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "EXPIRES", 0.5)
    with held(tmp_path, other()).lease(whereabouts(), alive, patient=False):  # it says nothing for so long
        lease = json.loads((tmp_path / "run" / "lease.json").read_text())
        assert lease["pid"] == os.getpid()
    assert not (tmp_path / "run" / "lease.json").exists()
    monkeypatch.setattr(remote, "EXPIRES", 100)
    gone = subprocess.Popen(["true"])
    gone.wait()
    began = time.monotonic()
    with held(tmp_path, whereabouts() | {"pid": gone.pid, "id": "x", "beat": 0}).lease(whereabouts(), alive, False):
        assert time.monotonic() - began < 5
    with (
        pytest.raises(UserError, match=f"being worked on by process {os.getpid()}"),
        held(tmp_path, whereabouts() | {"id": "x", "beat": 0, "boot": boot()}).lease(whereabouts(), alive, False),
    ):
        raise AssertionError


@pytest.mark.slow
def test_two_machines_do_one_run_once(there, cache, tmp_path):
    url, environments = f"root=file://{there}", [{"KD_CACHE": str(tmp_path / name)} for name in "ab"]
    both = [start(tmp_path, "-m", url, "seed=0,1", **e) for e in environments]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    logs = [log.read_text() for name in "ab" for log in (tmp_path / name).rglob("fkl*/log.txt")]
    assert sum("step 12/12" in log for log in logs) == 2, logs


@pytest.mark.parametrize(
    "root, says",
    [
        ("nosuch://bucket/kd", "nosuch"),
        ("s3://name:hunter22@bucket/kd", "there seems to be a secret in it"),
        ("https://host/kd?X-Amz-Signature=hunter22", "there seems to be a secret in it"),
    ],
)
def test_urls_that_cannot_be(cache, tmp_path, root, says):
    with pytest.raises(UserError, match=says) as error:
        here(tmp_path, f"root='{root}'")
    assert "hunter22" not in str(error.value)
    assert not cache.exists() or not any(b"hunter22" in p.read_bytes() for p in cache.rglob("*") if p.is_file())


def test_a_folder_is_no_url(tmp_path):
    made = settings(tmp_path)
    assert remote.home(made["root"]) == tmp_path and Run(tmp_path, "x").remote is None

"""A root under a URL: what counts is there, and a machine that is lost loses nothing that had arrived."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from kd.runs.run import Run
from kd.system import files, remote
from kd.system.remote import Remote
from kd.system.remote_checkpoints import RemoteCheckpoints
from tests.refusals import refused
from tests.small import ENVIRONMENT, TRAIN, folder, here, listed, outcome, small_config, start, train


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

"""A URL that is away for a time stops no run."""

import json
import time

import pytest

from kd.runs.run import Run
from kd.system import retries
from kd.system.remote import Remote
from kd.system.remote_checkpoints import RemoteCheckpoints
from tests.small import here, small_config
from tests.system.away import Away


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

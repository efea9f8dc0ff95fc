"""Upload of a student to the Hub, whose client is a stand-in here: checked before a training, repeatable after it."""

from pathlib import Path

import pytest

import train as product
from kd.runs import upload
from kd.runs.run import Run
from tests.refusals import refused
from tests.runs.sealed import RUN
from tests.small import folder, result, small_config


class Hub:
    """Client of the Hub that keeps what it gets. Faults are errors to raise, by the name of a method."""

    account = {"name": "ann", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}  # noqa: RUF012
    faults: dict[str, Exception] = {}  # noqa: RUF012
    calls: list[tuple] = []  # noqa: RUF012

    def _do(self, name, **given):
        if name in self.faults:
            raise self.faults[name]
        self.calls.append((name, given))

    def whoami(self):
        self._do("whoami")
        return self.account

    def create_repo(self, repo_id, private, exist_ok):
        self._do("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        files = {path.name for path in Path(folder_path).iterdir()}
        self._do("upload_folder", repo_id=repo_id, files=files, message=commit_message)


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    client = type("Client", (Hub,), {"faults": {}, "calls": [], "account": dict(Hub.account)})
    monkeypatch.setattr("huggingface_hub.HfApi", client)
    return client


def test_a_student_is_uploaded_with_its_card_and_the_name_of_the_run_stays(root, hub, capsys):
    done = product.train(small_config(root, *RUN, "push_to_hub=my-student"))
    assert done.run.name == folder(root, "fkl").name and done.before
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1] == {"repo_id": "ann/my-student", "private": True, "exist_ok": True}
    assert {"README.md", "model.safetensors", "tokenizer.json", "kd.json"} <= hub.calls[2][1]["files"]
    assert "https://hub/ann/my-student" in capsys.readouterr().err


def test_a_failed_upload_leaves_the_run_done_and_names_the_command(root, hub):
    config = small_config(root, *RUN, "seed=1", "push_to_hub=lab/s")
    hub.faults["upload_folder"] = ConnectionError("reset")
    with refused(option="push_to_hub", got="lab/s", why=("reset", "The run is done"), commands="hf upload lab/s"):
        product.train(config)
    (run,) = [path for path in root.glob("fkl-*") if result(path)["config"]["seed"] == 1]
    assert Run(root, run.name).state()["state"] == "done"
    hub.faults.clear()
    assert product.train(config).before and hub.calls[-1][0] == "upload_folder"


@pytest.mark.parametrize(
    ("name", "fault", "fields"),
    [("a b", None, {"need": "OWNER/NAME"}), ("a/b/c", None, {"need": "OWNER/NAME"}),
     ("other/s", None, {"need": "ann, lab", "hint": "push_to_hub=ann/s"}),
     ("s", OSError("no token"), {"why": "no token", "hint": "hf auth login"})],
)  # fmt: skip
def test_login_and_name_are_checked_before_training(root, hub, monkeypatch, name, fault, fields):
    monkeypatch.setattr("kd.experiment.prerequisites.ensure", lambda *_: pytest.fail("it trains"))
    if fault:
        hub.faults["whoami"] = fault
    config = small_config(root, *RUN, "seed=2").derive(push_to_hub=name)
    with refused(option="push_to_hub", got=name, **fields):
        product.train(config)


def test_a_token_that_may_only_read_is_refused(hub):
    hub.account["auth"] = {"accessToken": {"role": "read"}}
    with refused(option="push_to_hub", got="s", why="only read", hint="HF_TOKEN"):
        upload.repository("s")


def test_a_sweep_has_no_repository(tmp_path):
    with refused(option="push_to_hub", got="s", conflict="sweep=mine", hint="without the sweep"):
        small_config(tmp_path, "push_to_hub=s", "sweep=mine")

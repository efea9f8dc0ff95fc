"""A config runs nothing but what it may."""

import pickle
from pathlib import Path

import pytest
import torch

import train  # noqa: F401, registers what Hydra knows
from kd.config import components
from tests.config.options import config_of
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("conf")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def hostile(folder: Path) -> dict[str, dict]:
    """Return hostile nodes: if run, they create the file `canary`, end this process, or reach what is no option."""
    touch = {"command": f"touch {folder}/canary"}
    system = {"_target_": "os.system", **touch}
    unpickled = {"f": f"{folder}/evil.pt", "weights_only": False}
    return {
        "os.system": touch,
        "posix.system": touch,
        "logging.os.system": touch,
        "kd.system.files.os.system": touch,
        "kd.runs.loggers.os.system": touch,
        "subprocess.run": {"args": ["touch", f"{folder}/canary"]},
        "functools.partial": {"_args_": ["os.system"], **touch},
        "hydra.utils.call": {"config": system},
        "hydra.utils.instantiate": {"config": system},
        "kd.config.components.build": {"node": system, "path": ""},
        "builtins.open": {"file": f"{folder}/canary", "mode": "w"},
        "builtins.exec": {"source": f"open('{folder}/canary', 'w')"},
        "os._exit": {"status": 3},
        "torch.hub.load": {"repo_or_dir": str(folder), "model": "fkl", "source": "local", "trust_repo": True},
        "torch.load": unpickled,
        "kd.objective.losses.torch.load": unpickled,
        "joblib.load": {"filename": f"{folder}/evil.pkl"},
        "hubconf.fkl": {},
        "kd.system.files.write_json": {"path": f"{folder}/canary", "value": 1},
        "kd.runs.run.shutil.rmtree": {"path": str(folder)},
        "kd.objective.losses._check": {"option": "x", "got": 1, "good": True, "need": "x"},
        "torch.optim": {}, "torch.optim.AdamW.__init__": {}, "torch.optim.lr_scheduler.LambdaLR": {},
        "kd.objective.losses.Tensor": {}, "kd.objective.losses.UserError": {}, "kd.objective.losses.__builtins__": {},
        "kd.objective.losses.fkl.__globals__": {}, "kd.objective.losses.fkl.__call__": {}, "kd.objective.losses": {},
        "kd": {}, "fkl": {}, "": {}, "kd.losses.fkl": {},
        ".kd.objective.losses.fkl": {}, "kd..objective.losses.fkl": {}, "kd.objective.losses.fkl ": {},
        "Kd.objective.losses.fkl": {}, "kd/objective/losses.fkl": {},
    }  # fmt: skip


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    (tmp_path / "hubconf.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\ndef fkl(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "canary"


@pytest.mark.parametrize("target", hostile(Path()))
def test_hostile_target_is_refused_before_it_runs(target, canary):
    node = {"_target_": target, **hostile(canary.parent)[target]}
    for tree in (
        {"loss": node},
        {"data": {"of": [[1, {"x": node}]]}},
        {"loss": {"_target_": "kd.objective.losses.fkl", "student": node}},
    ):
        with refused(why="not something a config may call"):
            components.check_targets(tree)
    with refused(why="not something a config may call"):
        components.build(node, "loss")
    assert not canary.exists() and canary.parent.exists()


@pytest.mark.parametrize(
    "target", [None, 1, True, ["os.system"], {"os.system": 1}, b"os.system", ["kd.objective.losses.fkl"]]
)
def test_target_that_is_no_text_is_refused(target):
    with refused(why="not something a config may call"):
        components.check_targets({"loss": {"_target_": target}})


@pytest.mark.parametrize(
    "words",
    [
        ["loss._target_=os.system", "+loss.command='touch {canary}'"],
        ["loss._target_=${evil}", "+evil=os.system", "+loss.command='touch {canary}'"],
        ["+trainer.hook={{_target_:os.system,command:'touch {canary}'}}"],
        ["+trainer.hooks=[{{_target_:os.system,command:'touch {canary}'}}]"],
        ["+student._target_=os.system", "+student.command='touch {canary}'"],
    ],
)
def test_hostile_command_line_is_refused_before_it_runs(words, canary):
    with refused(got="os.system", why="not something a config may call"):
        config_of(*(word.format(canary=canary) if "touch" in word else word for word in words))
    assert not canary.exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "allow_pickle", "weights_only", "use_safetensors"])
def test_argument_that_lets_foreign_code_in_is_refused_anywhere(key):
    with refused(option=f"student.{key}", got=True, why="not accepted from a config"):
        config_of(f"+student.{key}=true")
    for tree in ({key: False}, {"data": {"a": {"b": {key: 1}}}}, {"trainer": {"a": [[{key: None}]]}}):
        with refused(why="not accepted from a config") as caught:
            components.check_targets(tree)
        assert caught.value.option.endswith(key)

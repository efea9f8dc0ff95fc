"""Folders with options, of packages and of the command line."""

import sys
from pathlib import Path

import pytest

from kd.config import components, compose, plugins, search_path
from kd.config.help import axes
from tests.config.plugged import write
from tests.refusals import refused


def test_two_plugins_with_one_option_name_are_refused(allowed, monkeypatch):
    write(allowed.parent / "other", {"__init__.py": "", "conf/loss/mine.yaml": "_target_: kd.objective.losses.fkl\n"})
    monkeypatch.setenv(plugins.VARIABLE, "mypkg,other")
    second = allowed.parent / "other" / "conf" / "loss" / "mine.yaml"
    with refused(option=second, why=str(allowed / "conf" / "loss" / "mine.yaml"), hint="another name"):
        compose.register_folders()


@pytest.mark.parametrize("name", ["loss/akl", "student/1m", "sweeps/loss", "method/kd"])
def test_an_option_that_would_replace_one_of_kd_is_refused(name, allowed):
    write(allowed / "conf", {f"{name}.yaml": "a: 1\n"})
    with refused(option=allowed / "conf" / f"{name}.yaml", why="would take the place of kd's own"):
        compose.register_folders()


GLOBAL = "# @package _global_\n"
HOSTILE = {
    "hydra in a global file": f"{GLOBAL}hydra:\n  callbacks:\n    x:\n      _target_: evil.Boom\n",
    "another package": "# @package hydra.callbacks.x\n_target_: evil.Boom\n",
    "another package below the first line": "# A loss.\n# @package hydra.callbacks.x\n_target_: evil.Boom\n",
    "defaults by a path": "defaults:\n  - ../../evil\n",
    "defaults of hydra": f"{GLOBAL}defaults:\n  - override /hydra/job_logging: default\n",
    "defaults in a package": f"{GLOBAL}defaults:\n  - /loss@hydra.callbacks.x: fkl\n",
    "defaults that are no list": "defaults: {/hydra/launcher: basic}\n",
    "a target": "_target_: evil.Boom\n",
    "a target of the standard library": "_target_: os.system\n",
    "a target far down": f"{GLOBAL}trainer:\n  hooks: [{{_target_: evil.Boom}}]\n",
    "the environment": "_target_: kd.objective.losses.fkl\nx: ${oc.env:HOME}\n",
    "the environment in a key": "_target_: kd.objective.losses.fkl\n? '${oc.env:HOME}'\n: 1\n",
    "the environment, hidden": "_target_: kd.objective.losses.fkl\nx: [{y: '${${a}:HOME}'}]\n",
    "a tag": "!!python/object/apply:os.system ['touch canary']\n",
    "foreign code": f"{GLOBAL}student:\n  trust_remote_code: true\n",
    "no mapping": "[1, 2]\n",
    "binary": "\0",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_of_a_folder_is_refused_when_it_is_read(text, package, monkeypatch):
    folder = write(package.parent / "theirs", {"loss/theirs.yaml": text})
    write(package.parent, {"evil.py": "open('canary', 'w')\nclass Boom: ...\n"})
    monkeypatch.chdir(package.parent)
    assert search_path.take(["--config-dir", "theirs", "seed=1"]) == ["seed=1"]
    assert plugins.folders() == (folder,)
    with refused() as caught:
        compose.register_folders()
    assert str(folder / "loss" / "theirs.yaml") in str(caught.value)
    assert not Path("canary").exists() and "evil" not in sys.modules


def test_a_folder_adds_options_to_every_group(package):
    text = f"{GLOBAL}# Akl with a tail\ndefaults:\n  - override /loss: akl\nloss:\n  mu: 0.25\n"
    files = {"method/tail.yaml": text, "sweeps/mus.yaml": "# Which mu?\nruns:\n- loss=akl loss.mu=0,1\n",
             "truncation/top_3.yaml": "_target_: kd.objective.truncation.top_k\nk: 3\n",
             "notes.txt": "", "hydra/launcher/evil.yaml": "_target_: evil.Boom\n"}  # fmt: skip
    folder = write(package.parent / "theirs", files)
    assert search_path.take([f"hydra.searchpath=[file://{folder}]"]) == []
    assert search_path.words() == [f"hydra.searchpath=[file://{folder}]"]
    compose.register_folders()
    config = compose.config_of(["method=tail", "truncation=top_3"])
    assert (config.loss.name, config.loss.args["mu"]) == ("akl", 0.25)
    assert (config.truncation.name, config.truncation.args["k"]) == ("top_k", 3)
    assert compose.config_of(["logits=offline", "record=top_3"]).record.args["k"] == 3
    assert compose.composed("sweeps=mus").sweep.name == "mus"
    text = axes()
    for piece in (
        "method=tail              Akl with a tail",
        "sweeps=mus               Which mu?",
        "truncation=top_3 ",
    ):
        assert piece in text
    assert "evil" not in text
    with refused(option="loss", got="mine"):
        compose.config_of(["loss=mine"])


def test_files_of_plugins_are_read_once_at_the_start(allowed, monkeypatch):
    folder = write(allowed.parent / "theirs", {"loss/theirs.yaml": "_target_: kd.objective.losses.fkl\n"})
    read, reads = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda file, *args, **kw: (reads.append(file), read(file, *args, **kw))[1])
    compose.register()
    search_path.take(["--config-dir", str(folder)])
    compose.register_folders()
    compose.config_of(["loss=theirs"])
    assert reads.count(allowed / "conf" / "loss" / "mine.yaml") == reads.count(folder / "loss" / "theirs.yaml") == 1


def test_words_of_a_folder_are_read_as_they_are_typed(package):
    folder = write(package.parent / "a folder, of theirs", {"loss/a.yaml": "_target_: kd.objective.losses.fkl\n"})
    search_path.take(["-cd", str(folder)])
    (word,) = search_path.words()
    plugins._typed_folders.clear()
    assert search_path.take([word]) == [] and plugins.typed_folders() == (folder,)


@pytest.mark.parametrize(
    ("words", "option", "fields"),
    [
        (["--config-dir", "nowhere"], "--config-dir", {"why": "no such folder"}),
        (["--config-dir", "~nosuchuser/x"], "~nosuchuser/x", {"why": "there is no home folder for ~nosuchuser"}),
        (["--config-dir"], "--config-dir", {"why": "no such folder"}),
        (["hydra.searchpath=[https://x.org/conf]"], "hydra.searchpath", {"need": "a folder of this machine"}),
        (["hydra.searchpath=file://x"], "hydra.searchpath", {"need": "a list of places"}),
        (["hydra.searchpath=[a],[b]"], "hydra.searchpath", {"need": "a list of places"}),
        (["hydra.searchpath=[pkg://mypkg.conf]"], "hydra.searchpath", {"why": "not allowed", "hint": "KD_PLUGINS="}),
    ],
)
def test_a_place_without_options_is_refused(words, option, fields, package):
    with refused(option=option, **fields):
        search_path.take(words)


def test_a_package_on_the_search_path_is_not_imported(allowed):
    write(allowed, {"more/loss/yours.yaml": "_target_: mypkg.losses.mine\nbeta: 1.0\n"})
    search_path.take(["hydra.searchpath=[pkg://mypkg.more]"])
    assert "yours" in components.option_names("loss")


def test_conf_of_a_plugin_may_hold_other_things(allowed):
    (allowed / "conf" / "loss" / "mine.yaml").unlink()
    write(allowed, {"conf/server/app.yaml": "port: 80\n"})
    compose.register_folders()
    assert "mine" not in components.option_names("loss")


def test_a_folder_without_options_is_refused(package):
    folder = write(package.parent / "theirs", {"losses/mine.yaml": ""})
    search_path.take(["--config-dir", str(folder)])
    with refused(option=folder, why="has no options", hint="loss/NAME.yaml"):
        compose.register_folders()

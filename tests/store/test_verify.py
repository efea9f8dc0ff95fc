"""The program kd.store: verify compares a store with its teacher, info describes it."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kd import former_names
from kd.experiment import store_check
from kd.models import causal_lm
from kd.store import __main__ as store_main
from kd.store.reader import Store
from kd.system import files
from tests.refusals import refused
from tests.small import TOP, folder, write
from tests.store.damage import SHARDS, flip, only


def test_verify_digests_every_file(root):
    path = only(root)
    held = Store(path, path.parent)
    held.verify()
    for name in (SHARDS[2], "validation.safetensors"):
        flip(path / name)
        with refused(option=path / name, why="is damaged"):
            held.verify()
        flip(path / name)


def test_verify_compares_with_the_teacher_and_info_says_what_it_is(root, command_line):
    path = str(only(root))
    code, message = command_line("verify", path)
    assert code == 0 and "10 files are all what was written" in message and "8 rows of 32 tokens recomputed" in message
    code, message = command_line("info", path)
    assert code == 0 and "top_k k=5" in message and "60 rows of 32 tokens" in message and "8 shards" in message
    shutil.rmtree(folder(root, "lm"))
    code, message = command_line("verify", path)
    assert code == 0 and "no row was computed again" in message
    flip(Path(path) / SHARDS[0])
    code, message = command_line("verify", path)
    assert code == 2 and f"{SHARDS[0]} is damaged" in message
    code, message = command_line("info", f"{path}/none")
    assert code == 2 and "is no store" in message
    code, message = command_line("info", f"root={root}", path)
    assert code == 0 and "top_k k=5" in message
    code, message = command_line("write", "loss=akl")  # and --root
    assert code == 2 and f"Type root={root}." in message


def test_a_secret_typed_as_a_switch_is_not_shown(command_line):
    secret = "hf_" + 30 * "a"
    code, message = command_line("write", f"--logger.token={secret}")
    assert code == 2 and "there seems to be a secret" in message and secret not in message


def test_an_empty_root_in_the_environment_counts_as_none(monkeypatch):
    folders: list[Path] = []
    monkeypatch.setenv("KD_ROOT", "")
    monkeypatch.setattr(sys, "argv", ["kd.store", "info", "x"])
    monkeypatch.setattr(store_main, "Store", lambda path, folder: folders.append(folder))
    store_main.main()
    assert folders == [Path("runs/stores")]


def test_verify_finds_numbers_that_the_teacher_does_not_say(root, command_line, monkeypatch):
    def other(*arguments):
        model = real(*arguments)
        with torch.no_grad():
            model.head.output.weight.mul_(3)
        return model

    real = store_check.teacher_model
    monkeypatch.setattr(store_check, "teacher_model", other)
    code, message = command_line("verify", str(only(root)))
    assert code == 2 and "does not hold the probabilities of this teacher" in message


DRAWS = ("truncation=random", "truncation.draws=50")


@pytest.mark.parametrize("noise", [1e-6, 3e-3])
def test_verify_forgives_draws_that_the_last_bits_of_arithmetic_have_moved(root, command_line, monkeypatch, noise):
    held = write(root, *DRAWS)
    shaken(monkeypatch, lambda logits: logits + noise * torch.randn_like(logits))
    code, message = command_line("verify", held.path)
    assert code == 0 and "from what it expects of them" in message


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (DRAWS, lambda x: 3 * x),
        (DRAWS, lambda x: x / 3),
        (DRAWS, lambda x: x.roll(1, -1)),
        (DRAWS, lambda x: x * math.nan),
        (TOP, lambda x: x * math.nan),
    ],
)
def test_verify_finds_another_teacher(root, command_line, monkeypatch, words, change):
    held = write(root, *words)
    shaken(monkeypatch, change)
    code, message = command_line("verify", held.path)
    assert code == 2 and "does not hold the probabilities of this teacher" in message


def shaken(monkeypatch, change) -> None:
    """Have models say something else than they would."""
    real = causal_lm.Head.forward
    monkeypatch.setattr(causal_lm.Head, "forward", lambda self, hidden: change(real(self, hidden)))
    monkeypatch.setattr(causal_lm.CausalLM, "check", lambda self, option: None)


def test_verify_goes_where_the_store_was_moved(root, command_line):
    path = only(root)
    shutil.move(path, root / "moved")
    path.mkdir()
    (path / "manifest.json").write_text("damaged")
    code, message = command_line("verify", str(root / "moved"))
    assert code == 0 and "recomputed by the teacher" in message


def test_verify_reads_the_settings_of_an_earlier_version(root, command_line):
    """Write settings of an earlier version: modules outside packages, and components marked as partial."""
    former = {f"kd.{new}": f"kd.{old.partition('.')[0]}" for old, new in former_names.MODULES.items()}
    path = only(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    manifest["settings"].pop("adapter")  # newer than that version
    for group, node in manifest["settings"].items():
        if isinstance(node, dict) and node.get("_target_", "").startswith("kd."):
            module, _, name = node["_target_"].rpartition(".")
            node |= {"_target_": f"{former[module]}.{name}"} | ({"_partial_": True} if group != "data" else {})
    assert manifest["settings"]["loss"] == {"_target_": "kd.losses.fkl", "_partial_": True}
    files.write_json(path, manifest | {"digest": files.digest_of(manifest)})
    code, message = command_line("verify", str(only(root)))
    assert code == 0 and "recomputed by the teacher" in message


def test_settings_of_a_foreign_store_are_checked_like_any(root, command_line):
    path = only(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    manifest["settings"]["data"]["_target_"] = "os.system"
    files.write_json(path, manifest | {"digest": files.digest_of(manifest)})
    code, message = command_line("verify", str(only(root)))
    assert code == 2 and "os.system" in message


@pytest.mark.parametrize("settings", [None, [], "text"])
def test_a_store_without_the_settings_of_a_run_is_refused(settings, root, command_line):
    path = only(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"], manifest["settings"]
    manifest |= {} if settings is None else {"settings": settings}
    files.write_json(path, manifest | {"digest": files.digest_of(manifest)})
    code, message = command_line("verify", str(only(root)))
    assert code == 2 and "has settings that are not those of a run" in message and "Traceback" not in message

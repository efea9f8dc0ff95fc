"""A store is what it says, or is refused: the file or field that differs is named, and what is printed mends it."""

import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors
import torch

import train as product
from kd import former_names
from kd.config.components import typed
from kd.config.compose import composed, config_of
from kd.errors import UserError
from kd.experiment import prerequisites, store_check, stores
from kd.experiment.dependencies import Plan, cached_corpus
from kd.models import causal_lm
from kd.models import hub as hub_module
from kd.store import __main__ as store_main
from kd.store import transfer
from kd.store.reader import Store
from kd.store.spec import covers
from kd.system import files, programs
from kd.system.console import console
from kd.system.remote import Remote, local_root
from tests.refusals import refused
from tests.small import SMALL, TOP, content, folder, here, outcome, put_result, python, result, train, type_in, write

OFFLINE = ("logits=offline", *TOP)


@pytest.fixture
def root(trained_root, tmp_path) -> Path:
    """A root of its own, with data, teacher and store."""
    shutil.copytree(trained_root, tmp_path / "root")
    return tmp_path / "root"


def only(root: Path) -> Path:
    """The one store in a root."""
    (store,) = (root / "stores").iterdir()
    return store


def refusal(root: Path, *words: str) -> str:
    """Return the error of a run with this store, which is refused before it starts."""
    with pytest.raises(UserError) as caught:
        here(root, *OFFLINE, *words)
    assert not list(root.glob("fkl*/metrics.jsonl"))
    return str(caught.value)


def times(path: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in path.glob("*.safetensors")}


# Damage


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def change_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"entries": 9600', '"entries": 9601'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, 1),
    "truncated": truncate,
    "longer": lengthen,
    "gone": Path.unlink,
}
SHARDS = ("shard-00000.safetensors", "shard-00005.safetensors", "shard-00007.safetensors")
CASES = [(SHARDS[1], damage) for damage in DAMAGE]
CASES += [(name, "flipped") for name in (SHARDS[0], SHARDS[2], "head.safetensors", "validation.safetensors")]
CASES += [("manifest.json", damage) for damage in ("flipped", "first byte", "truncated")]
CASES += [("head.safetensors", "gone")]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_named_and_what_is_printed_mends_it_and_no_other_file(root, name, damage):
    path, before, times_before = only(root), content(only(root)), times(only(root))
    DAMAGE[damage](path / name)
    message = refusal(root)
    assert f"{path / name} is damaged" in message
    time.sleep(0.01)
    type_in(message)
    assert content(path) == before
    changed = {n for n, when in times(path).items() if when != times_before[n]}
    assert changed == {name} - {"manifest.json"}


@pytest.mark.parametrize("name", ["shard-00005.json", "head.json", "begun.json"])
def test_damage_of_what_only_a_writer_reads_is_named_and_mended(root, name):
    path, before = only(root), content(only(root))
    text = (path / name).read_bytes()
    # In a name: the last digit of a number may say nothing.
    flip(path / name, (text.index(b'":') - 1) / (len(text) - 1))
    message = refusal(root)
    assert f"{path / name} is damaged" in message
    type_in(message)
    described = ("begun.json", "manifest.json") if name == "begun.json" else ()  # with the settings of who wrote last
    assert all(content(path)[n] == data for n, data in before.items() if n not in described)
    here(root, *OFFLINE)


def test_number_in_the_manifest_is_damage(root):
    path = only(root)
    before = content(path)
    change_number(path / "manifest.json")
    assert content(path) != before
    message = refusal(root)
    assert f"{path / 'manifest.json'} is damaged" in message
    type_in(message)
    assert content(path) == before


def test_two_shards_in_each_others_place(root):
    path, before = only(root), content(only(root))
    a, b = path / SHARDS[0], path / SHARDS[1]
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other), b.write_bytes(one)
    for name in SHARDS[:2]:  # one after the other
        message = refusal(root)
        assert f"{path / name} is damaged" in message
        with contextlib.suppress(UserError):  # which names the other
            type_in(message)
    assert content(path) == before
    # A shard and its note as well, so that both are whole.
    for end in ("safetensors", "json"):
        os.rename(a.with_suffix(f".{end}"), path / "aside")
        os.rename(b.with_suffix(f".{end}"), a.with_suffix(f".{end}"))
        os.rename(path / "aside", b.with_suffix(f".{end}"))
    assert f"{path / SHARDS[0]} is damaged" in refusal(root)


def test_a_store_without_manifest_is_made_whole_again_by_the_run(root):
    path, before, times_before = only(root), content(only(root)), times(only(root))
    (path / "manifest.json").unlink()
    with refused(option=path, why="has no manifest.json", commands="python -m kd.store write") as caught:
        Store(path, path.parent)
    type_in(str(caught.value))
    assert content(path) == before
    (path / "manifest.json").unlink()
    here(root, *OFFLINE)
    assert content(path) == before and times(path) == times_before


def test_a_damaged_note_makes_one_shard_anew(root):
    path, before = only(root), content(only(root))
    (path / "shard-00003.json").write_text("{")
    (path / "manifest.json").unlink()
    here(root, *OFFLINE)
    assert content(path) == before


def test_from_the_command_line(root):
    """Exit code 2, no traceback, and a line that a shell takes."""
    path, before = only(root), content(only(root))
    DAMAGE["flipped"](path / SHARDS[0])
    words = (*OFFLINE, "data.tokens=2000")
    output = train(root, *words, code=2)
    assert f"{path / SHARDS[0]} is damaged" in output and "Traceback" not in output
    command = "\n".join(line for line in output.splitlines() if line.startswith("  "))
    shell = f"python() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    printed = subprocess.run(["bash", "-ec", shell], check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout
    process = python([sys.executable, *printed.split("\0")[:-1]], root)
    assert process.communicate(timeout=240)[0] and process.returncode == 0
    assert content(path) == before
    here(root, *OFFLINE)


def test_damage_while_a_run_reads_is_found_at_the_first_touch(root):
    path = only(root)
    held = Store(path, path.parent)
    rows = np.load(next((root / "data").glob("*/train.npy")))
    held.read(np.array([0]), rows[:1, :-1])
    flip(path / SHARDS[2])
    with refused(option=path / SHARDS[2], why="is damaged"):
        held.read(np.array([len(rows) - 1]), rows[-1:, :-1])


def test_verify_digests_every_file(root):
    path = only(root)
    held = Store(path, path.parent)
    held.verify()
    for name in (SHARDS[2], "validation.safetensors"):
        flip(path / name)
        with refused(option=path / name, why="is damaged"):
            held.verify()
        flip(path / name)


@pytest.fixture
def command_line(root, monkeypatch, capsys):
    """Function that runs python -m kd.store and returns its exit code and its messages."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kd.store", *words, f"--root={root}"])
        monkeypatch.setattr(console, "width", 200)
        try:
            store_main.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().err

    return call


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
    def other(settings, components, train):
        model = real(settings, components, train)
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


# Something else


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("teacher", ("teacher.seed=1",)),
        ("teacher", ("teacher.steps=7",)),
        ("data", ("data.seed=1",)),
        ("data", ("data.seed=1", "teacher=none")),
        ("data", ("data.seq_len=16",)),
        ("data", ("data.tokens=1900", "teacher=none")),
        ("data", ("data.val_rows=7", "teacher=none")),
        ("tokenizer", ("data.states=17", "teacher=none")),
    ],
)
def test_store_of_something_else_is_refused_by_field(root, field, words):
    message = refusal(root, f"logits.path={only(root)}", *words)
    assert f"its {field} is " in message
    words = shlex.split(message.splitlines()[-1])
    here(root, "logits=offline", f"logits.path={only(root)}", "trainer.steps=1", *words)


def test_all_that_differs_is_said(root):
    message = refusal(root, f"logits.path={only(root)}", "data.seed=1", "data.states=17", "teacher.seed=1")
    assert all(f"its {field} is " in message for field in ("teacher", "tokenizer", "data"))


def test_other_weights_of_the_teacher_are_refused(root):
    weights = folder(root, "lm") / "student" / "model.safetensors"
    record = result(folder(root, "lm"))
    assert record["weights"] == {"model.safetensors": files.digest(weights)}
    record["weights"] = {"model.safetensors": "0" * 32}
    put_result(folder(root, "lm"), record)
    message = refusal(root)
    assert "its weights is model.safetensors=" in message
    (folder(root, "lm") / "student" / "model.safetensors").write_bytes(weights.read_bytes())
    record["weights"] = {"model.safetensors": files.digest(weights)}
    type_in(message)  # removes the store
    put_result(folder(root, "lm"), record)
    here(root, *OFFLINE)


def test_two_teachers_of_the_hub_have_a_store_each(tmp_path):
    hub = ("data.tokens=2000", "logits=offline", "student=hub", "student.name=org/student", "teacher=hub")
    plans = []
    for name in ("org/big", "org/bigger"):
        typed = ["data=text", "data.files=x.txt", *hub, f"teacher.name={name}", f"root={tmp_path}"]
        (tmp_path / "x.txt").write_text("text")
        typed[1] = f"data.files={tmp_path / 'x.txt'}"
        plans.append(Plan.from_config(config_of(typed)))
    assert plans[0].store.key != plans[1].store.key


def test_the_words_for_a_store_of_a_pretrained_teacher_have_no_settings_of_its_training(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    typed = ["data=text", f"data.files={tmp_path / 'x.txt'}", "logits=offline", "teacher=hub", "teacher.name=org/big"]
    config = config_of(typed).derive(teacher={"steps": 9, "batch": 9, "lr": 9, "precision": "bf16", "seed": 9})
    words = shlex.split(stores.write_command(config))  # as a preset sets them
    assert "teacher.seed=9" in words and config_of(["logits=offline", *words]).teacher.steps != 9


def test_a_hub_teacher_is_known_by_its_commit(tmp_path, monkeypatch):
    cache = tmp_path / "models--org--big"
    (cache / "snapshots" / "abc123").mkdir(parents=True)
    (cache / "snapshots" / "abc123" / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub_module.revision("org/big") == "abc123" and hub_module.revision("org/none") is None


def text(root: Path, words: list[str]) -> tuple[str, ...]:
    """A corpus of many short documents."""
    (root / "text.txt").write_text("\n\n".join(" ".join(words[i : i + 40]) for i in range(0, len(words), 40)))
    return ("data=text", f"data.files={root / 'text.txt'}", "data.val_share=0.2", "data.seq_len=16", "data.val_rows=4")


def test_one_token_of_the_data(tmp_path):
    (tmp_path / "data").mkdir()
    words = [f"w{number % 7}" for number in np.random.default_rng(0).integers(0, 100, 4000)]
    small = [w for w in SMALL if not w.startswith("data")]

    def run(*more: str) -> None:
        all_words = [*small, *(OFFLINE if "logits=none" not in more else ()), f"root={tmp_path}", *more]
        product.train(config_of(all_words))

    run(*text(tmp_path, words), "data.vocab=300", "logits=none", "teacher=none")
    shutil.copytree(next((tmp_path / "data").glob("*/tokenizer")), tmp_path / "tokenizer")
    run(*text(tmp_path, words), f"data.tokenizer={tmp_path / 'tokenizer'}")
    words[100] = "w0" if words[100] != "w0" else "w1"
    cached_corpus.cache_clear()  # another process would read the file
    held = only(tmp_path)
    for teacher in ("teacher=none", "teacher=100k"):
        with refused(option=held, why="its data is ") as caught:
            changed = text(tmp_path, words)
            run(*changed, f"data.tokenizer={tmp_path / 'tokenizer'}", f"logits.path={held}", teacher)
        assert ("its teacher is" in str(caught.value)) == (teacher != "teacher=none")
        assert "its tokenizer is" not in str(caught.value)
    with refused(option=held, why="its tokenizer is "):
        run(*text(tmp_path, words), "data.vocab=290", f"logits.path={held}", "teacher=none")


def test_rows_are_read_for_the_tokens_they_were_written_for(root):
    path = only(root)
    rows = np.load(next((root / "data").glob("*/train.npy")))
    held = Store(path, path.parent)
    index = np.array([59, 0, 3])
    entries = held.read(index, rows[index, :-1])
    assert entries.count.shape == (3, 32) and (entries.count == 5).all()
    for row in index:
        wrong = rows[index, :-1].copy()
        wrong[list(index).index(row), 31] ^= 1
        with refused(option=path, why=f"other tokens: those of row {row} differ"):
            held.read(index, wrong)
    with refused(option=path, why="those of row 0 differ"):  # another order of packing
        held.read(np.array([0]), rows[1:2, :-1])


def test_an_older_format_is_refused_with_what_makes_a_new_one(root, tmp_path):
    path = only(root)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["of"]["format"] -= 1
    files.write_json(path / "manifest.json", manifest | {"digest": files.digest_of(manifest)})
    message = refusal(root)
    assert f"{path} has format 0, and this version of kd reads format 1" in message
    type_in(f"{message.replace('FOLDER', str(tmp_path / 'new'))} root={root}")
    here(root, *OFFLINE, f"logits.path={tmp_path / 'new'}")


def test_the_beginning_of_another_store_is_not_gone_on_with(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(only(root) / "begun.json", other)
    message = refusal(root, f"logits.path={other}", "record=top_k", "record.k=6")
    assert "its truncation is top_k k=5, and here it is top_k k=6" in message
    type_in(message)
    here(root, *OFFLINE, f"logits.path={other}", "record=top_k", "record.k=6")


# A part of what a store holds

FULL, RANDOM = {"name": "full"}, {"name": "random", "draws": 50}
PLUGIN = {"name": "above", "least": 0.1}  # a truncation of a package that is not kd's


def top(**settings) -> dict:
    return {"name": {"k": "top_k", "p": "top_p", "pk": "top_p_k"}["".join(settings)], **settings}


@pytest.mark.parametrize(
    ("requested", "held", "inside"),
    [
        (FULL, FULL, True),
        (top(k=50), FULL, True),
        (top(p=1.0), FULL, True),
        (RANDOM, FULL, True),
        (RANDOM | {"draws": 10**6}, FULL, True),
        (FULL, top(k=50), False),
        (FULL, top(p=1.0), False),
        (FULL, RANDOM, False),
        (top(k=50), top(k=50), True),
        (top(k=1), top(k=50), True),
        (top(k=51), top(k=50), False),
        (top(p=0.9), top(k=50), False),
        (top(p=0.9, k=50), top(k=50), True),
        (top(p=1.0, k=51), top(k=50), False),
        (top(p=0.9), top(p=0.9), True),
        (top(p=0.5), top(p=0.9), True),
        (top(p=0.91), top(p=0.9), False),
        (top(k=1), top(p=0.9), False),
        (top(p=0.9, k=10**6), top(p=0.9), True),
        (top(p=0.91, k=1), top(p=0.9), False),
        (top(p=0.9, k=20), top(p=0.9, k=20), True),
        (top(p=0.5, k=10), top(p=0.9, k=20), True),
        (top(p=0.95, k=10), top(p=0.9, k=20), False),
        (top(p=0.5, k=21), top(p=0.9, k=20), False),
        (top(k=20), top(p=0.9, k=20), False),
        (top(p=0.9), top(p=0.9, k=20), False),
        (RANDOM, RANDOM, True),
        (RANDOM | {"draws": 1}, RANDOM, True),
        (RANDOM | {"draws": 51}, RANDOM, False),
        (RANDOM, top(k=50), False),
        (RANDOM, top(p=1.0), False),
        (top(k=1), RANDOM, False),
        (top(p=0.1), RANDOM, False),
        (PLUGIN, PLUGIN, True),
        (PLUGIN, {"name": "full"}, True),
        (PLUGIN | {"least": 0.2}, PLUGIN, False),
        (PLUGIN, top(k=10**6), False),
        (top(k=1), PLUGIN, False),
    ],
)
def test_what_a_store_covers(requested, held, inside):
    assert covers(held, requested) is inside


@pytest.mark.parametrize(
    ("requested", "held", "inside"),
    [
        ({"least": 0.1}, {"least": 0.1}, True),
        ({"least": 0.2}, {"least": 0.1}, True),
        ({"least": 0.05}, {"least": 0.1}, False),
        ({"least": 0.1, "most": 3}, {"least": 0.1, "most": 5}, True),
        ({"least": 0.2, "most": 6}, {"least": 0.1, "most": 5}, False),
        ({"least": 0.2, "mode": "b"}, {"least": 0.1, "mode": "a"}, False),
        ({"least": 0.2, "mode": "a"}, {"least": 0.1, "mode": "a"}, True),
        ({"least": 0.2}, {"least": 0.1, "mode": "a"}, False),
        ({"least": None}, {"least": 0.1}, False),
        ({"least": 0.2}, {"least": None}, False),
        ({"least": True}, {"least": 0.1}, False),
        ({"least": 0.2}, {"name": "other", "least": 0.1}, False),
        ({"least": 0.2}, {"name": "top_k", "k": 9}, False),
        ({"least": 0.2}, {"name": "full"}, True),
    ],
)
def test_what_a_store_of_a_plugin_covers_is_what_it_declares(requested, held, inside):
    nested = {"least": "higher", "most": "lower"}
    assert covers({"name": "above"} | held, {"name": "above"} | requested, nested) is inside


@pytest.mark.parametrize("requested", ["full", "random", "top_p", "top_k"])
def test_asking_for_more_names_both_before_anything_is_done(root, requested, monkeypatch):
    monkeypatch.setattr(prerequisites, "teacher_model", None)  # not even loaded
    for words in ((f"logits.path={only(root)}",), (f"logits.path={root / 'none'}", "record=top_k", "record.k=5")):
        with refused(option="truncation") as caught:
            here(
                root,
                "logits=offline",
                f"truncation={requested}",
                *(["truncation.k=6"] if requested == "top_k" else []),
                *words,
            )
        assert caught.value.got.startswith(requested) and "more than" in caught.value.why
        assert "top_k" in f"{caught.value.conflict} {caught.value.why}"
    assert not (root / "none").exists() and not list(root.glob("fkl*"))


def test_asking_for_less_is_answered(root):
    run = here(
        root, "logits=offline", "truncation=top_p_k", "truncation.p=0.5", "truncation.k=4", f"logits.path={only(root)}"
    )
    assert result(run)["state"] == "done" and len(list((root / "stores").iterdir())) == 1


@pytest.mark.parametrize(("installed", "program"), [(True, "kd-store"), (False, "python -m kd.store")])
def test_hints_name_the_program_as_it_was_started(installed, program, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_by_script", installed)
    (tmp_path / "empty").mkdir()
    with refused(option=tmp_path / "empty", why="is no store", commands=f"{program} write ") as caught:
        Store(str(tmp_path / "empty"), tmp_path)
    assert caught.value.commands[0].startswith(program)


# Elsewhere


def test_reading_leaves_a_store_as_it_is(root):
    path = only(root)
    here(root, *OFFLINE)  # what is left after that has been read often
    shutil.rmtree(folder(root, "fkl"))
    for part in (path, *path.iterdir()):
        part.chmod(0o555 if part.is_dir() else 0o444)
    before = {p: p.stat().st_mtime_ns for p in (path, *path.iterdir())}
    here(root, *OFFLINE)
    here(root, *OFFLINE, f"logits.path={path}", "seed=1")
    assert {p: p.stat().st_mtime_ns for p in (path, *path.iterdir())} == before
    path.chmod(0o755)


def test_opening_looks_into_no_file(tmp_path, root, monkeypatch):
    """However many shards there are."""
    path, count = tmp_path / "big", 5000
    manifest = json.loads((only(root) / "manifest.json").read_text())
    manifest.pop("digest")
    note = {"count": 8, "entries": 1, "mass": 1.0, "size": 0, "digest": "0" * 32}
    manifest["files"] = {f"shard-{n:05}.safetensors": note | {"first": 8 * n} for n in range(count)}
    files.write_json(path / "manifest.json", manifest | {"digest": files.digest_of(manifest)})
    for name in manifest["files"]:
        (path / name).touch()
    monkeypatch.setattr(files, "digest", None)
    monkeypatch.setattr(safetensors, "safe_open", None)
    began = time.monotonic()
    held = Store(path, tmp_path)
    assert time.monotonic() - began < 1
    assert held._place(8 * 4321 + 3) == ("shard-04321.safetensors", 3)


def test_a_url_is_read_through_local_copies(root, tmp_path):
    remote = tmp_path / "remote"
    shutil.move(only(root), remote)
    url = f"file://{remote}"
    here(root, *OFFLINE, f"logits.path={url}", "teacher=none")
    copies = only(root)
    shards = {p.name: p.read_bytes() for p in copies.glob("*.safetensors")}
    assert shards == {n: (remote / n).read_bytes() for n in shards} and len(shards) == 10
    local = folder(root, "fkl")
    shutil.copytree(local, tmp_path / "by-url")
    shutil.rmtree(local)
    here(root, *OFFLINE, f"logits.path={remote}", "teacher=none")
    assert outcome(folder(root, "fkl")) == outcome(tmp_path / "by-url")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_damage_at_a_url_is_refused_until_it_is_mended_there(root, tmp_path, damage):
    remote = tmp_path / "remote"
    shutil.move(only(root), remote)
    words = (*OFFLINE, f"logits.path=file://{remote}", "teacher=none")
    whole = (remote / SHARDS[0]).read_bytes()
    DAMAGE[damage](remote / SHARDS[0])
    for _ in range(2):
        with refused(option=f"file://{remote}/{SHARDS[0]}", why="is damaged", hint="copy that file again"):
            here(root, *words)
    (remote / SHARDS[0]).write_bytes(whole)
    here(root, *words)


def test_a_damaged_copy_is_read_anew(root, tmp_path):
    remote = tmp_path / "remote"
    shutil.move(only(root), remote)
    url = f"file://{remote}"
    Store(url, root / "stores").verify()
    copy = only(root) / SHARDS[0]
    flip(copy)
    Store(url, root / "stores").verify()
    assert copy.read_bytes() == (remote / SHARDS[0]).read_bytes()


def test_a_url_is_written_to_and_an_upload_that_was_cut_off_goes_on(root, monkeypatch):
    url = f"memory://{root.name}/store"
    system = fsspec.filesystem("memory")
    put = type(system).put_file

    def fail(self, source: str, target: str, **more) -> None:
        if target.endswith("shard-00004.safetensors"):
            raise OSError("the network is gone")
        put(self, source, target, **more)

    expected = {n: d for n, d in content(only(root)).items() if n.endswith(".safetensors")}
    shutil.rmtree(root / "stores")
    with monkeypatch.context() as patch:
        patch.setattr(type(system), "put_file", fail)
        patch.setattr("kd.system.retries.PATIENCE", 0)
        with refused(option=url, why="the network is gone", hint="type the same command again"):
            here(root, *OFFLINE, f"logits.path={url}")
    assert not system.exists(f"{url}/manifest.json")
    times_before = times(only(root))
    here(root, *OFFLINE, f"logits.path={url}")
    assert times(only(root)) == times_before
    assert {n: system.cat_file(f"{url}/{n}") for n in expected} == expected
    shutil.rmtree(root / "stores")
    here(root, *OFFLINE, f"logits.path={url}", "teacher=none", "seed=1")  # from the URL alone
    with refused(option="nosuch://bucket/store", why="could not be read"):
        here(root, *OFFLINE, "logits.path=nosuch://bucket/store")


def test_a_store_of_a_root_under_a_url_is_written_under_that_url(root, monkeypatch, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    url = f"memory://{root.name}/kd"
    cache = local_root(url) / "stores"
    path = f"{url}/stores/{only(root).name}"
    files.local_path(path, cache).mkdir(parents=True)
    shutil.copy(only(root) / "begun.json", files.local_path(path, cache))
    with refused(option=path, why="is no store") as caught:
        Store(path, cache)
    words = str(caught.value).split()
    assert f"root={url}" in words and not any("cache" in word or "logits.path" in word for word in words)


def test_an_upload_leaves_out_what_was_sent_while_it_was_recorded(root, monkeypatch):
    url, folder, copied = f"memory://{root.name}/sent", only(root), []
    remote, system = Remote(url, folder), fsspec.filesystem("memory")
    remote.put(SHARDS[0], f"{SHARDS[0].partition('.')[0]}.json", SHARDS[1])  # one of them without a note
    remote.write(f"{SHARDS[1].partition('.')[0]}.json", {"digest": "of another one"})
    put = type(system).put_file
    monkeypatch.setattr(
        type(system), "put_file", lambda self, a, b, **m: copied.append(Path(a).name) or put(self, a, b)
    )
    transfer.upload(folder, url)
    assert sorted([*copied, SHARDS[0]]) == sorted([p.name for p in folder.glob("*.safetensors")] + ["manifest.json"])
    Store(url, root / "other").verify()


def test_an_upload_replaces_no_other_store(root):
    url = f"memory://{root.name}/shared"
    here(root, *OFFLINE, f"logits.path={url}")
    before = fsspec.filesystem("memory").cat_file(f"{url}/manifest.json")
    other = write(root, "truncation=top_k", "truncation.k=3", f"logits.path={root / 'other'}")
    with refused(option=url, why="holds another store, of "):
        transfer.upload(Path(other.path), url)
    transfer.upload(only_of(root, before), url)  # the same one, from another machine
    assert fsspec.filesystem("memory").cat_file(f"{url}/manifest.json") == before


def only_of(root: Path, manifest: bytes) -> Path:
    """The folder in which a store that is at a URL was written."""
    return next(p.parent for p in root.glob("stores/*/manifest.json") if p.read_bytes() == manifest)


def test_a_merge_to_a_url_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["store", "merge", "s3://bucket/store", "a", "b"])
    with pytest.raises(SystemExit):
        store_main.main()
    assert "merge joins folders" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["normkd", "wttm", "std", "entropy"])
def test_temperatures_of_whole_distributions_need_a_whole_store(root, name):
    assert f"temperature={name} is measured on" in refusal(root, f"temperature={name}")


def test_draws_that_a_store_cannot_count_are_refused(root):
    with refused(option="truncation.draws", got=32768, need="32,767", hint="truncation.draws=32767"):
        here(root, "logits=offline", "truncation=random", "truncation.draws=32768")


def test_words_of_a_store_are_read_back_by_hydra(tmp_path):
    for value in (None, True, 3, 2.5, "a b", "it's", "x,y", "a=b", "[1]", "/p/q-1.txt", "back\\", ["a b", 1, None]):
        assert composed(f"data.tokenizer={typed(value)}").data.tokenizer == value


def test_words_of_a_store_are_of_it_alone(root):
    """A store is written anew with words that leave the student out, whoever it was written for."""
    words = write(root, *TOP).words
    assert "student" not in words and "trainer" not in words and "truncation=top_k" in words
    assert write(root, "record=top_k", "record.k=5").path == str(only(root))

"""A store of something else is refused by the field that differs; one that holds more serves less."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import train as product
from kd.config.compose import config_of
from kd.experiment import prerequisites, stores
from kd.experiment.dependencies import Plan, cached_corpus
from kd.models import hub as hub_module
from kd.store.reader import Store
from kd.store.spec import covers
from kd.system import files, programs
from tests.refusals import refused
from tests.small import SMALL, folder, here, put_result, result, small_words, type_in
from tests.store.damage import OFFLINE, only, refusal


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
    assert not [word for word in words if word.startswith("teacher.") and not word.startswith("teacher.name=")]
    assert config_of(["logits=offline", *words]).teacher.steps != 9


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
        all_words = [
            *small_words(small, more),
            *(OFFLINE if "logits=none" not in more else ()),
            f"root={tmp_path}",
            *more,
        ]
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

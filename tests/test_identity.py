"""Names of runs."""

import os
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from kd.config import schema
from kd.config.fields import setting, traits_of
from kd.config.schema import ExperimentConfig, TrainerConfig
from kd.data import corpora, instructions, packing
from kd.experiment.dependencies import Plan, cached_corpus
from kd.runs import identity
from tests.small import small_config


def with_option(config: ExperimentConfig, option: Any, value: Any) -> ExperimentConfig:
    """Return the config under a schema that has one more option, trainer.new."""
    frozen = {"frozen": True, "kw_only": True}
    trainer = make_dataclass("Trainer", [("new", int | None, option)], bases=(TrainerConfig,), **frozen)
    node = config.to_dict()
    node["trainer"] = trainer.from_node(node["trainer"] | ({} if value is ABSENT else {"new": value}), "trainer")
    return config.derive(trainer=node["trainer"])


ABSENT = object()


def name_with(monkeypatch, config: ExperimentConfig, option: Any, value: Any) -> str:
    monkeypatch.setattr(identity, "TRAITS", schema.TRAITS | {"trainer.new": traits_of(option)})
    return identity.identity(with_option(config, option, value).flat())


def test_an_option_with_its_neutral_value_renames_nothing(tmp_path, monkeypatch):
    small = small_config(tmp_path)
    name = identity.identity(small.flat())
    for value in (None, ABSENT):  # typed, and in a config that is older than the option
        assert name_with(monkeypatch, small, setting(neutral=None), value) == name
    assert name_with(monkeypatch, small, setting(neutral=None), 1) != name


def test_a_default_that_changes_renames(tmp_path, monkeypatch):
    small = small_config(tmp_path)
    before = name_with(monkeypatch, small, setting(neutral=None, default=None), ABSENT)
    after = name_with(monkeypatch, small, setting(neutral=None, default=3), ABSENT)
    assert before == identity.identity(small.flat()) != after
    changed = small.derive(responses={"samples": 2}, trainer={"clip": 2.0})
    assert identity.identity(changed.flat()) != before


def test_an_option_without_effect_renames_nothing(tmp_path, monkeypatch):
    small = small_config(tmp_path)
    monkeypatch.setattr(identity, "NO_PART", (*identity.NO_PART, "trainer.new"))
    names = {name_with(monkeypatch, small, setting(effect=False), value) for value in (None, 1)}
    assert names == {identity.identity(small.flat())}


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change a file and leave its size and time as they were."""
    times, content = path.stat(), path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def name_of(root: Path, *words: str) -> str:
    cached_corpus.cache_clear()  # as in a process of its own
    return Plan.of(small_config(root, *words)).run.name


def test_the_name_of_a_run_is_of_what_is_in_the_models_it_is_given_by_path(tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    (model / "config.json").write_text('{"rms_norm_eps": 0.5}')
    text.write_text("aaa\n\nbbb")
    words = ("data=text", f"data.files={text}", "student=hub", f"student.name={model}", "teacher=none", "logits=none")
    before = name_of(tmp_path, *words)
    for path in (model / "config.json", text):
        os.utime(path, ns=(1, 1))
    assert name_of(tmp_path, *words) == before
    edit(model / "config.json", b"0.5", b"0.6")
    assert name_of(tmp_path, *words) != before
    edit(model / "config.json", b"0.6", b"0.5")
    assert name_of(tmp_path, *words) == before
    edit(text, b"aaa", b"ccc")
    assert name_of(tmp_path, *words) != before


TABLE = '{"prompt": "a", "response": "old", "text": "old"}\n'
READ = {
    "text": lambda path: corpora.text(str(path)),
    "instructions": lambda path: instructions.instructions(32, files=str(path)),
    "a folder": lambda path: corpora.hub(str(path.parent), streaming=False),
    "a folder of instructions": lambda path: instructions.instructions(32, name=str(path.parent)),
}


@pytest.mark.parametrize("kind", READ)
def test_text_that_was_edited_is_read_anew_though_its_size_and_time_are_the_same(tmp_path, kind):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.jsonl"
    path.write_text(TABLE)
    keys, rows = [], []
    for new in (b"old", b"new"):
        edit(path, b"old", new)
        corpus = READ[kind](path)
        keys.append(packing.key(corpus))
        rows.append(str(list(corpus.load())))
    assert keys[0] != keys[1]
    assert "old" in rows[0] and "old" not in rows[1] and "new" in rows[1]

"""Names of runs."""

import copy
import os
from dataclasses import make_dataclass
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from kd.config.components import CONF
from kd.config.compose import composed, default_config
from kd.config.fields import all_traits, hints, setting
from kd.config.groups import TrainerConfig
from kd.config.schema import ExperimentConfig
from kd.data import corpora, instructions, packing
from kd.experiment.dependencies import Plan, cached_corpus
from kd.runs import identity
from tests.small import small_config
from tests.test_golden import NOWHERE, names

# Of runs that need a teacher, a start and a store between them.
NAMED = (("loss=rkl",), ("logits=offline", "truncation=top_k"), ("data=instructions", "start=sft", "alpha.peak=0.5"))


@cache
def composed_as_it_is(*words: str, compose=hydra.compose) -> DictConfig:
    return compose("config", list(words))


def names_with(defaults: dict[str, object], monkeypatch) -> set[str]:
    """Names of NAMED and of all that these runs need, if the configs had these defaults, some of new options."""

    def compose(_: str, words: list[str]) -> DictConfig:
        config = copy.deepcopy(composed_as_it_is(*words))
        for option, value in defaults.items():
            OmegaConf.update(config, option, value, force_add=True)
        return config

    run_names = set()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "key", lambda *_, **__: "0" * 16)
        patch.setattr(hydra, "compose", compose)
        forget()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for words in NAMED:
                typed = [*words, *NOWHERE]
                run_names |= set(names(ExperimentConfig.from_hydra(hydra.compose("config", typed), typed)))
    forget()
    return run_names


def forget() -> None:
    composed.cache_clear()
    default_config.cache_clear()


@pytest.mark.parametrize(
    ("new", "option", "default", "renames"),
    [
        (setting(neutral=1), "trainer.new", 1, False),
        (setting(neutral=1), "trainer.new", 2, True),
        (setting(), "trainer.new", 1, True),
        (setting(effect=False), "trainer.new", 1, False),
        (None, "trainer.clip", 0.5, True),
        (None, "data.special", "tokens", True),
        (None, "trainer.checkpoint_every", 7, False),
        (None, "token_names", "any", False),
    ],
)
def test_what_a_default_renames(new, option, default, renames, monkeypatch):
    """A new option renames nothing while it has its neutral value or no effect; another default renames all runs."""
    usual = names_with({}, monkeypatch)
    if new:
        trainer = make_dataclass("Trainer", [("new", int, new)], bases=(TrainerConfig,), frozen=True, kw_only=True)
        monkeypatch.setitem(hints(ExperimentConfig), "trainer", trainer)
        monkeypatch.setattr(identity, "TRAITS", all_traits(ExperimentConfig))
    renamed = names_with({option: default}, monkeypatch)
    assert len(renamed) == len(usual) == 8
    assert renamed.isdisjoint(usual) if renames else renamed == usual


def test_a_config_from_before_an_option_keeps_its_name(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    new = setting(neutral=1)
    trainer = make_dataclass("Trainer", [("new", int, new)], bases=(TrainerConfig,), frozen=True, kw_only=True)
    monkeypatch.setitem(hints(ExperimentConfig), "trainer", trainer)
    monkeypatch.setattr(identity, "TRAITS", all_traits(ExperimentConfig))
    again = ExperimentConfig.from_dict(config.to_dict())
    assert again.flat() == config.flat() | {"trainer.new": 1}
    assert identity.identity(again.flat()) == identity.identity(config.flat())


def test_a_seed_is_part_of_every_name_and_a_root_of_none(tmp_path):
    config = small_config(tmp_path).flat()
    name = identity.identity(config)
    assert identity.identity(config | {"root": "elsewhere"}) == name
    assert identity.identity(config | {"seed": 1}) != name


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change a file and leave its size and time as they were."""
    times, content = path.stat(), path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def name_of(root: Path, *words: str) -> str:
    cached_corpus.cache_clear()  # as in a process of its own
    return Plan.from_config(small_config(root, *words)).run.name


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

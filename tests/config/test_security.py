"""Hostile words and files run nothing, reach nothing outside, and steer no terminal; secrets get into no file.

What is hostile would, if it were obeyed, make a file, the canary. Words go through train.py as it is started by people,
in a process that was forked from this one, since some of them would end it.
"""

import gzip
import io
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.table import Table

from kd.config import components, compose, overrides, search_path, security
from kd.data import packing
from kd.launch import command_line, optuna_search
from kd.models import causal_lm
from kd.parallel import fsdp
from kd.runs.outcome import Outcome, RunState
from kd.runs.run import Run
from kd.store import reader, spec
from kd.system import checkpoint_files, files
from kd.system.console import Terminal, styled
from sweeps.report.__main__ import main as report_main
from tests import small
from tests.refusals import refused
from tests.small import ENVIRONMENT, FORK, SMALL, TINY, TRAIN, folder, here, listed, small_words, train
from tests.zygote import Forked, start_zygote


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def with_evil(home: Path) -> Path:
    """Return the canary of a folder with a module `evil` that makes it, and knows no limits of Hydra's."""
    path = home / "canary"
    (home / "evil.py").write_text(f"open({str(path)!r}, 'w')\nclass Boom:\n    def __init__(self, *a, **k): pass\n")
    return path


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """Not to be there at the end. The module `evil` that makes it can be imported."""
    path = with_evil(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop("evil", None)
    assert not path.exists()


def _main(words: list[str], program: Path | str) -> None:
    sys.argv = [str(program), *words]
    sys.modules.pop("evil", None)
    if isinstance(program, Path):
        sys.modules.pop("train", None)
        runpy.run_path(str(program), run_name="__main__")
    else:
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__")


def _mains(commands: list[tuple[Path, list[str]]], program: Path | str) -> None:
    """Run a command in each folder, up to the first that ends otherwise than by sys.exit()."""
    for home, words in commands:
        sys.stdout = sys.stderr = open(home / "output", "w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os.chdir(home)
        sys.path.insert(0, str(home))
        code: object = None
        try:
            _main(words, program)
        except SystemExit as error:
            code = error.code
        sys.path.remove(str(home))
        (home / "code").write_text(str(1 if isinstance(code, str) else code or 0))


def typed(commands: dict[Path, list[str]], program: Path | str = TRAIN) -> dict[Path, tuple[int | None, str]]:
    """Exit code and output of a command in each folder, in one process; FILE in its words is the folder.

    A command that ended the process, and those after it, have no exit code.
    """
    listed = [(home, [word.replace("FILE", str(home)) for word in words]) for home, words in commands.items()]
    process = FORK.Process(target=_mains, args=(listed, program))
    process.start()
    process.join(200)
    process.kill()
    process.join()
    ends = {}
    for home in commands:
        code, output = ((home / name).read_text(errors="replace") if (home / name).exists() else None
                        for name in ("code", "output"))  # fmt: skip
        ends[home] = int(code) if code else None, output or ""
        (home / "code").unlink(missing_ok=True)
    return ends


def typed_in(home: Path, *words: str, program: Path | str = TRAIN) -> tuple[int | None, str]:
    """Exit code and output of one command."""
    return typed({home: list(words)}, program)[home]


BOOM = "{_target_:evil.Boom}"
GLOBAL = "# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: evil.Boom\n"
UP = "../" * 40
WORDS = {  # what is typed after `python train.py`
    "target": ["loss._target_=evil.Boom"],
    "target that hydra blocks": ["loss._target_=os.system", "+loss.command='touch FILE/canary'"],
    "target by interpolation": ["loss._target_=${evil}", "+evil=evil.Boom"],
    "target far down": [f"+trainer.hooks=[{{a:[{BOOM}]}}]"],
    "target that is partial": ["loss._target_=evil.Boom", "loss._partial_=false"],
    "target with positional arguments": ["loss._target_=functools.partial", "+loss._args_=[evil.Boom]"],
    "target of an argument": [f"+loss.student={BOOM}"],
    "target of the student": ["+student._target_=evil.Boom"],
    "target of the optimizer": ["optim._target_=evil.Boom"],
    "target of a truncation to record": ["logits=offline", "record=top_k", "record._target_=evil.Boom"],
    "trust_remote_code": ["+student.trust_remote_code=true"],
    "trust_remote_code, nested": ["+data.builder={trust_remote_code:true}"],
    "callback": [f"+hydra.callbacks.x={BOOM}"],
    "callback, added for sure": [f"++hydra.callbacks.x={BOOM}"],
    "callback by interpolation": ["+hydra.callbacks.x=${evil}", f"+evil={BOOM}"],
    "callback in a package": ["+loss@hydra.callbacks.x=fkl"],
    "all of hydra": [f"+hydra={{callbacks:{{x:{BOOM}}}}}"],
    "launcher": ["-m", "hydra.launcher._target_=evil.Boom"],
    "launcher's argument": ["-m", f"+hydra.launcher.x={BOOM}"],
    "launcher's argument by interpolation": ["-m", "+hydra.launcher.x=${evil}", f"+evil={BOOM}"],
    "launcher from a file": ["-m", f"hydra/launcher={UP}FILE/evil"],
    "sweeper": ["-m", "hydra.sweeper._target_=evil.Boom"],
    "sweeper's argument": ["-m", f"+hydra.sweeper.x={BOOM}"],
    "logging": ["+hydra.job_logging={version:1,root:{},handlers:{x:{class:evil.Boom}}}"],
    "logging, piece by piece": ["++hydra.job_logging.root={level: INFO}",
                                "++hydra.job_logging.handlers.x.class=evil.Boom"],
    "environment": ["+hydra.job.env_set.PYTHONPATH=FILE"],
    "folder": ["hydra.run.dir=FILE/canary"],
    "search path": ["hydra.searchpath=[file://FILE/conf]", "loss=evil"],
    "config folder": ["loss=evil", "--config-dir", "FILE/conf"],
    "config folder, abbreviated": ["loss=evil", "--config-d=FILE/conf"],
    "config folder, short": ["loss=evil", "-cd", "FILE/conf"],
    "config path": ["--config-path=FILE/conf", "--config-name=evil"],
    "rerun of a pickle": ["--experimental-rerun=FILE/evil.pickle"],
    "option by a path": [f"loss={UP}FILE/conf/loss/evil"],
    "option by a path among others": ["-m", f"loss=fkl,{UP}FILE/conf/loss/evil"],
    "option by a path in a choice": ["-m", f"loss=choice(fkl,'{UP}FILE/conf/loss/evil')"],
    "option by an absolute path": ["loss=FILE/conf/loss/evil"],
    "sweep by a path": [f"sweeps={UP}FILE/conf/loss/evil"],
    "name of a sweep": ["-m", "sweep=../../canary"],
    "environment in a setting": ["sweep=${oc.env:HOME}"],
    "environment in a setting, hidden": ["+a=oc.env", "sweep=${${a}:HOME}"],
    "pickle of the path in a setting": ["data=text", "data.files=FILE/evil.pickle"],
}  # fmt: skip


def filled(home: Path) -> Path:
    """Return a folder with what the words above name."""
    (home / "conf" / "loss").mkdir(parents=True)
    for path in (home / "conf" / "loss" / "evil.yaml", home / "evil.yaml", home / "conf" / "evil.yaml"):
        path.write_text(GLOBAL)
    for name in ("evil.pickle", "config.pickle"):
        (home / name).write_bytes(pickle.dumps(Payload(home / "canary")))
    return home


@pytest.fixture
def hostile(canary) -> Path:
    return filled(canary.parent)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, tuple[int | None, str, set[str]]]:
    """Exit code and output of each hostile command line, and the files that it made."""
    homes = {name: filled(with_evil(tmp_path_factory.mktemp("hostile")).parent) for name in WORDS}
    before = {name: set(home.rglob("*")) for name, home in homes.items()}
    usual = ["data=markov", "logger=none", "root=FILE/runs"]
    ends = typed({home: [*usual, *WORDS[name]] for name, home in homes.items()})
    new_files = {n: {str(p.relative_to(home)) for p in {*home.rglob("*")} - before[n]} for n, home in homes.items()}
    return {name: (*ends[home], new_files[name]) for name, home in homes.items()}


@pytest.mark.parametrize("name", WORDS)
def test_hostile_command_line_is_refused_before_anything_is_made(refusals, name):
    code, output, new_files = refusals[name]
    assert code in (1, 2) and "Traceback" not in output, output
    assert new_files == {"output"}


@pytest.mark.parametrize("words", [WORDS[w] for w in ("callback", "option by a path", "logging", "search path")])
def test_the_canary_would_sing(words, hostile, monkeypatch):
    """The words above do what they would if nothing checked them, so that the tests above could fail."""
    monkeypatch.setattr(security, "check_command_line", lambda words: words)
    monkeypatch.setattr(components, "check_targets", lambda node: None)
    monkeypatch.setattr(security, "check_words", lambda words: None)
    monkeypatch.setattr(search_path, "take", lambda words: words)  # so that Hydra reads the folders itself
    typed_in(hostile, "data=markov", "logger=none", "root=FILE/runs", "trainer.steps=0", *words)
    assert (hostile / "canary").exists()
    (hostile / "canary").unlink()


@pytest.mark.parametrize(
    "line", ["target", "callback by interpolation", "option by a path", "environment in a setting"]
)
def test_hostile_line_of_a_sweep_starts_no_run(line, hostile, monkeypatch):
    (hostile / "sweeps").mkdir()
    monkeypatch.setattr(components, "SWEEPS", hostile / "sweeps")
    words = " ".join(f'"{w}"' for w in WORDS[line]).replace("FILE", str(hostile))
    (hostile / "sweeps" / "mine.yaml").write_text(f"# What?\nruns:\n- seed=1\n- '{words}'\n".replace("$", "$"))
    code, output = typed_in(hostile, "sweeps=mine", *SMALL, "root=FILE/runs")
    assert code in (1, 2) and "Traceback" not in output and not list(hostile.glob("runs/*/config.json")), output


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system",
                                 "!!python/object/new:evil.Boom []", "!!python/module:evil"])  # fmt: skip
def test_sweep_with_a_tag_of_yaml_is_refused(tag, canary, monkeypatch):
    (canary.parent / "sweeps").mkdir()
    monkeypatch.setattr(components, "SWEEPS", canary.parent / "sweeps")
    (canary.parent / "sweeps" / "mine.yaml").write_text(f"# What?\nruns:\n- {tag}\n")
    with refused(option=canary.parent / "sweeps" / "mine.yaml", why="is no plain YAML"):
        compose.register()


def test_hostile_words_to_write_a_store_are_refused(hostile):
    for words in (WORDS["target"], WORDS["callback"], WORDS["option by a path"]):
        code, output = typed_in(hostile, "write", *TINY, "root=FILE/runs", *words, program="kd.store")
        assert code == 2 and "Traceback" not in output, output


# Files.


def test_checkpoint_that_is_a_pickle_is_not_read_though_its_digest_is_right(canary):
    path = canary.parent / "step-00000003.ckpt"
    for content in (Payload(canary), {"state_dict": {"a": Payload(canary)}}):
        torch.save(content, path)
        path.with_suffix(".xxh3").write_text(files.digest(path))
        assert checkpoint_files.newest(canary.parent) == path
        with refused(option=path, why="something other than numbers", commands=f"rm -r {path.parent}"):
            checkpoint_files.DigestIO().load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(canary)))
    with refused(option=path, why="something other than numbers", commands=f"rm -r {path.parent}"):
        checkpoint_files.DigestIO().load_checkpoint(path)


@pytest.fixture
def sharded(tmp_path) -> Path:
    path = tmp_path / "step-00000003.ckpt"
    dcp.save(state(), storage_writer=fsdp.Writer(path), no_dist=True)
    return path


def state(scale: float = 1.0) -> dict:
    """Return the state of a model and its optimizer; scale=0 gives the tensors that loading fills."""
    group = {"lr": 0.1 * scale, "betas": (0.9 * scale, 0.5), "foreach": None, "params": ["a"]}
    weights = {"a": scale * torch.arange(6.0).view(2, 3), "b": scale * torch.ones(2, dtype=torch.bfloat16)}
    moments = {"a": {"step": torch.tensor(3.0 * scale)}}
    return {"state_dict": weights, "optimizer_0": {"state": moments, "param_groups": [group]}}


def read(path: Path) -> dict:
    loaded = state(0.0)
    fsdp.read(loaded, path, no_dist=True)
    return loaded


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_shards_are_read_as_they_were_written(sharded):
    assert {p.name for p in sharded.iterdir()} == {"__0_0.distcp", "index.json"}  # and no .metadata, which is a pickle
    loaded, expected = read(sharded), state()
    torch.testing.assert_close(loaded["state_dict"], expected["state_dict"], rtol=0, atol=0)
    assert loaded["optimizer_0"] == expected["optimizer_0"]


def test_hostile_metadata_of_shards_is_not_read(sharded, canary):
    evil = pickle.dumps(Payload(canary))
    (sharded / ".metadata").write_bytes(evil)
    assert read(sharded)["optimizer_0"] == state()["optimizer_0"]
    (sharded / "index.json").write_bytes(evil)
    with refused(option=sharded, why="is no checkpoint of kd", commands=f"rm -r {sharded.parent}"):
        fsdp.Reader(sharded).read_metadata()
    (sharded / "index.json").unlink()
    with refused(option=sharded, why="is no checkpoint of kd", commands=f"rm -r {sharded.parent}"):
        fsdp.Reader(sharded).read_metadata()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("state_dict.b", "dtype", "load"), ("state_dict.b", "dtype", "hub"), ("state_dict.b", "size", "x"),
     ("optimizer_0.param_groups.a.lr", "file", "../evil.pickle"), ("optimizer_0.param_groups.a.lr", "file", None)],
)  # fmt: skip
def test_hostile_index_of_shards_is_refused(sharded, canary, name, field, value):
    index = json.loads((sharded / "index.json").read_text())
    full_name = next(key for key in index if key == name or (name.endswith(".lr") and key.endswith(".lr")))
    index[full_name][field] = value
    (sharded / "index.json").write_text(json.dumps(index))
    with refused(option=sharded, why="is no checkpoint of kd", commands=f"rm -r {sharded.parent}"):
        fsdp.Reader(sharded).read_metadata()


def test_hostile_bytes_within_a_shard_are_not_run(sharded, canary):
    index = json.loads((sharded / "index.json").read_text())
    key = next(key for key in index if key.endswith(".lr"))
    evil = io.BytesIO()
    torch.save(Payload(canary), evil)
    shard = sharded / "__0_0.distcp"
    index[key] |= {"start": shard.stat().st_size, "length": len(evil.getvalue())}
    shard.write_bytes(shard.read_bytes() + evil.getvalue())
    (sharded / "index.json").write_text(json.dumps(index))
    with refused(option=sharded, why="something other than numbers", commands=f"rm -r {sharded.parent}"):
        read(sharded)


@pytest.fixture
def root(trained_root, canary) -> Path:
    return Path(shutil.copytree(trained_root, canary.parent / "root"))


def altered(root: Path, **changes) -> Path:
    """The store of a root with another manifest, whose digest is right."""
    (path,) = root.glob("stores/*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    manifest |= changes
    path.write_text(json.dumps(manifest | {"digest": files.digest_of(manifest)}))
    return path.parent


@pytest.mark.parametrize("action", ["info", "verify"])
def test_store_that_names_a_file_elsewhere_is_refused(action, trained_root, canary):
    commands = {}
    for number, name in enumerate(
        ("../../x.safetensors", "/etc/passwd", "shard-00000.pkl", "", "shard-0/../x.safetensors")
    ):
        root = Path(shutil.copytree(trained_root, canary.parent / str(number)))
        commands[root] = [action, str(altered(root, files={name: {"size": 1, "digest": "x"}}))]
    for code, output in typed(commands, "kd.store").values():
        assert code == 2 and "is no file of a store" in output and "Traceback" not in output, output


def test_store_behind_a_url_writes_and_removes_nothing_elsewhere(root):
    at = altered(root, files={"../victim": {"size": 1, "digest": "x", "first": 0}})
    cache = root.parent / "cache"
    victim = files.local_path(f"file://{at}", cache).parent / "victim"
    victim.parent.mkdir()
    victim.write_text("mine")
    (at.parent / "victim").write_text("theirs")
    with refused(option=f"file://{at}/manifest.json", why="is no file of a store"):
        reader.Store(f"file://{at}", cache)
    assert victim.read_text() == "mine"


def test_words_of_a_store_are_shown_so_that_a_shell_runs_none(root):
    at = altered(root, words="data=markov; touch canary $(touch canary) `touch canary`", format=0)
    with refused(option=at / "shard-00000.safetensors", why="is damaged"):
        (at / "shard-00000.safetensors").write_bytes(b"")
        reader.Store(at, root / "stores")
    shown = reader.Store.__new__(reader.Store)
    shown.manifest = {"words": spec.quote_words("a; touch canary $(touch canary)")}
    subprocess.run(["sh", "-c", f"echo {shown.manifest['words']}"], cwd=root.parent, check=True)


@pytest.mark.parametrize("change", [{"loss": BOOM}, {"loss": {"_target_": "evil.Boom"}},
                                    {"evil": {"_target_": "evil.Boom"}}, {"student": {"trust_remote_code": True}},
                                    {"data": None}, {"root": "/"}])  # fmt: skip
def test_hostile_settings_of_a_store_call_nothing(change, root):
    (path,) = root.glob("stores/*/manifest.json")
    settings = json.loads(path.read_text())["settings"]
    at = altered(root, settings=settings | change)
    code, output = typed_in(root.parent, "verify", str(at), "--root", str(root), program="kd.store")
    assert "Traceback" not in output and (code == 2 or "root" in change), output


def test_shard_that_is_a_pickle_is_not_read_though_its_digest_is_right(root, canary):
    (path,) = root.glob("stores/*/manifest.json")
    evil = path.parent / "shard-00000.safetensors"
    evil.write_bytes(pickle.dumps(Payload(canary)))
    notes = json.loads(path.read_text())["files"]
    notes[evil.name] |= {"size": evil.stat().st_size, "digest": files.digest(evil)}
    store = reader.Store(altered(root, files=notes), root / "stores")
    with refused(option=evil, why="it is no file of tensors"):
        store.read(np.array([0]), np.zeros((1, 32)))


def test_packed_rows_that_are_a_pickle_are_not_read(root, canary):
    (path,) = root.glob("data/*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    np.save(path.parent / "train.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    manifest["digests"]["train.npy"] = files.digest(path.parent / "train.npy")
    path.write_text(json.dumps(manifest | {"digest": files.digest_of(manifest)}))
    with pytest.raises(ValueError, match=r"allow_pickle|[Pp]ython objects"):
        packing.open_packed(path.parent)


@pytest.mark.parametrize("name", ["config.json", "result.json", "state.json"])
def test_hostile_json_of_a_teachers_run_calls_nothing(name, root):
    file = folder(root, "lm") / name
    content = json.loads(file.read_text())
    hostile = {"_target_": "evil.Boom", "_partial_": False}
    content |= {"loss": hostile, "config": content.get("config", {}) | {"loss": hostile}}
    if name == "result.json":  # a digest is no secret
        content["digest"] = files.digest_of({k: v for k, v in content.items() if k != "digest"})
    file.write_text(json.dumps(content))
    here(root, "trainer.steps=1")


MODEL = {"auto_map": {"AutoConfig": "hubconf.C", "AutoModelForCausalLM": "hubconf.M"}, "model_type": "evil"}


def test_model_with_code_of_its_own_is_refused(root, canary):
    hub = shutil.copytree(folder(root, "lm") / "student", canary.parent / "hub")
    (hub / "hubconf.py").write_text(f"open({str(canary)!r}, 'w')\nC = M = T = object\n")
    plain = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(plain | MODEL))
    with refused(option="student.name", got=hub, why="could not be loaded"):
        causal_lm.build_model(None, str(hub), 17, 32, "student.name")
    (hub / "config.json").write_text(json.dumps(plain | {"attn_implementation": "evil/kernel",
                                                         "_attn_implementation": "evil/kernel"}))  # fmt: skip
    with refused(option="student.name", got=hub, why="asks for code of the Hub"):
        causal_lm.build_model(None, str(hub), 17, 32, "student.name")
    (hub / "config.json").write_text(json.dumps(plain))
    tokenizer_config = json.loads((hub / "tokenizer_config.json").read_text())
    tokenizer_config |= {"auto_map": {"AutoTokenizer": ["hubconf.T", "hubconf.T"]}, "tokenizer_class": "Evil"}
    (hub / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    named = ("teacher=hub", f"teacher.name={hub}")
    code, output = typed_in(canary.parent, *small_words(TINY, named), f"root={root}", *named)
    assert code == 2 and "Traceback" not in output, output


def test_weights_that_are_a_pickle_are_not_read(root, canary):
    hub = shutil.copytree(folder(root, "lm") / "student", canary.parent / "hub")
    weights = hub / "model.safetensors"
    weights.unlink()
    torch.save(Payload(canary), hub / "pytorch_model.bin")
    with refused(option="student.name", got=hub, why="could not be loaded"):
        causal_lm.build_model(None, str(hub), 17, 32, "student.name")
    weights.write_bytes(pickle.dumps(Payload(canary)))
    with refused(option="student.name", got=hub, why="could not be loaded"):
        causal_lm.build_model(None, str(hub), 17, 32, "student.name")


def test_dataset_with_code_of_its_own_is_refused(canary):
    hub = canary.parent / "set"
    hub.mkdir()
    (hub / "set.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (hub / "train.pkl").write_bytes(pickle.dumps(Payload(canary)))
    code, output = typed_in(canary.parent, "data=hub", f"data.name={hub}", "logger=none", "logits=none", "teacher=none")
    assert code == 2 and "Traceback" not in output, output


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/etc", "a/b", "a\\b", "a\nb", "", None, 3])
def test_sweep_that_names_a_run_elsewhere_is_refused(tmp_path, name, capsys):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"runs": [{"run": name, "overrides": []}]}))
    assert report_main(["s", "--root", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/../../x"])
def test_report_of_a_sweep_elsewhere_is_refused(tmp_path, name, capsys):
    assert report_main([name, "--root", str(tmp_path)]) == 2
    assert "no path" in capsys.readouterr().err


def test_words_of_a_search_that_come_from_its_journal_are_checked(hostile):
    import optuna

    (hostile / "runs" / "sweeps").mkdir(parents=True)
    words = [*SMALL, f"root={hostile / 'runs'}"]
    name = f"multirun-{files.digest_of(optuna_search.asked_for([*words, 'seed=1,2']))[:8]}"
    journal = optuna.storages.journal.JournalFileBackend(str(hostile / "runs" / "sweeps" / f"{name}.optuna"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal), study_name=optuna_search.asked_for([*words, "seed=1,2"])
    )
    trial = study.ask()
    trial.suggest_categorical("seed", ["${oc.env:HOME}"])
    code, output = typed_in(hostile, "-m", "hydra/sweeper=optuna", *words, "seed=1,2")
    assert code == 2 and "not to anything outside" in output and "Traceback" not in output, output


# What is said.

CONTROL = "\x1b]0;pwned\x07\x1b[2J\x1b]52;c;cHduZWQ=\x07\x9b31m\u202e\x00\r"


def test_no_text_steers_the_terminal(tmp_path):
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=False, width=200)
    table = Table(title=f"t{CONTROL}")
    table.add_column(f"h{CONTROL}")
    table.add_row(styled(f"{CONTROL}cell", "dim"))
    for thing in (f"a{CONTROL}b", table):
        console.print(thing)
    console.print(f"c{CONTROL}d", markup=False, soft_wrap=True)
    assert all(c.isprintable() or c in "\n" for c in out.getvalue()), ascii(out.getvalue())
    assert "]0;pwned" in out.getvalue() and "cell" in out.getvalue()  # shown, and not obeyed


def test_report_prints_no_control_characters(tmp_path, capsys):
    (tmp_path / "sweeps").mkdir()
    line = {"run": "run-1", "overrides": [f"loss={CONTROL}"]}
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"runs": [line]}))
    Run(tmp_path, "run-1").end(Outcome(RunState.FAILED, CONTROL))
    assert report_main(["s", "--root", str(tmp_path)]) == 2
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().err)


# Secrets.

SECRET = "sesame0123456789sesame0123456789sesame01"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SLURM_JWT", "MY_PASSWORD")


def contents(path: Path) -> bytes:
    """Return the bytes of a file, and of everything that is compressed in it."""
    raw = path.read_bytes()
    parts = [raw]
    if raw[:2] == b"\x1f\x8b":
        parts.append(gzip.decompress(raw))
    for start in re.finditer(rb"\x78[\x01\x9c\xda]", raw):
        with suppress(zlib.error):
            parts.append(zlib.decompressobj().decompress(raw[start.start() :]))
    return b"".join(parts)


def test_secrets_of_the_environment_are_in_no_file(tmp_path, monkeypatch):
    root, home = tmp_path / "root", tmp_path / "home"
    root.mkdir()
    home.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    git_config = (root / ".git" / "config").read_bytes()
    subprocess.run([*git, "remote", "add", "origin", f"https://{SECRET}@example.org/x.git"], check=True)
    environment = dict.fromkeys(NAMES, SECRET) | {"SLURM_JOB_ID": "1", "HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:9"}
    environment |= {"HOME": str(home), "WANDB_MODE": "offline", "TMPDIR": str(home)}

    class Loaded(Forked):  # libraries read the environment while they are loaded
        server = start_zygote(ENVIRONMENT | environment)

    monkeypatch.setattr(small, "popen", lambda: Loaded if Loaded.server else subprocess.Popen)
    words = ("teacher=none", "logits=none", "trainer.steps=2")
    diverges = ("lr=constant", "lr.peak=1e30,1e-3", "trainer.clip=0")
    train(root, "-m", *words, *diverges, "logger=wandb", code=1, **environment)
    train(root, *words, "seed=1", "logger=tensorboard", **environment)
    assert sorted(json.loads(p.read_text())["state"] for p in root.glob("*/state.json")) == ["diverged", "done", "done"]
    (root / ".git" / "config").write_bytes(git_config)
    seen = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"log.txt", "config.json", listed(root).name, "state.json"} <= {p.name for p in seen}
    assert any(p.suffix == ".wandb" for p in seen) and any("tfevents" in p.name for p in seen)
    assert [str(p) for p in seen if SECRET.encode() in contents(p)] == []


TYPED = [
    f"+logger.api_key={SECRET}", f"++logger.token={SECRET}", f"sweep={SECRET}", f"logger.project=x{SECRET}",
    "logits.path=s3://me:sesame@bucket/x", "data.name=https://sesame@example.org/x",
    "student.name='https://example.org/x?a=b&token=sesame'", "+a.password=sesame", "data.name=hf_" + "sesame" * 6,
    "root=s3://AKIASESAMESESAME1234/x", "+x=ghp_" + "sesame" * 6,
]  # fmt: skip


@pytest.mark.parametrize("word", TYPED)
@pytest.mark.parametrize("switches", [[], ["-m"]])
def test_secret_that_is_typed_is_refused_and_shown_nowhere(word, switches, canary, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    code, output = typed_in(canary.parent, *switches, "data=markov", f"root={canary.parent}/runs", word)
    assert code == 2 and "there seems to be a secret" in output and "environment" in output, output
    assert "sesame" not in output.lower() and not (canary.parent / "runs").exists()


def test_secret_in_the_path_that_the_environment_gives_is_refused(canary, monkeypatch):
    monkeypatch.setenv("KD_ROOT", "s3://me:sesame@bucket/runs")
    code, output = typed_in(canary.parent, "data=markov", "logger=none")
    assert code == 2 and output.startswith("root: there seems to be a secret") and "sesame" not in output, output


def test_secret_in_a_file_of_a_sweep_is_refused(canary, monkeypatch):
    (canary.parent / "sweeps").mkdir()
    monkeypatch.setattr(components, "SWEEPS", canary.parent / "sweeps")
    command_line.register.cache_clear()  # sweeps are listed once for each process
    (canary.parent / "sweeps" / "mine.yaml").write_text("# What?\nruns:\n- +logger.api_key=sesame\n")
    code, output = typed_in(canary.parent, "sweeps=mine", *SMALL, f"root={canary.parent}/runs")
    assert code == 2 and "logger.api_key: there seems to be a secret" in output and "sesame" not in output, output


@pytest.mark.parametrize(
    "word",
    ["data.tokens=100", "data.tokenizer=gpt2", "data.field=key", "logits.path=s3://bucket/keys",
     "student.name=a/hf_my_model",
     "data.name=hf://datasets/a/b@main", "root=/home/me/secret", "logits.path=sftp://me@host/x", "lr.peak=1e-4",
     "data.files='a/*.txt'", "optim.betas=[0.9,0.95]", "loss=choice(fkl,jsd)", "loss='glob(*)'", "hydra.verbose=true",
     "hydra/launcher=submitit_slurm", "+hydra.launcher.additional_parameters.account=x", "hydra.sweeper.n_trials=3",
     "lr.peak='tag(log,interval(1e-4,1e-2))'", "seed=${trainer.steps}"],
)  # fmt: skip
def test_ordinary_word_is_no_secret_and_not_hostile(word, monkeypatch):
    monkeypatch.setattr(overrides, "check_groups", lambda words: None)  # most ask for an option that has them
    security.check_command_line(["-m", word.replace("'", "") if "(" in word else word])

"""Hostile files run nothing: checkpoints, stores, packed rows, models and datasets."""

import io
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from kd.data import packing
from kd.models import causal_lm
from kd.parallel import fsdp
from kd.store import reader, spec
from kd.system import checkpoint_files, files
from tests.config.hostile import BOOM, Payload, typed, typed_in
from tests.refusals import refused
from tests.small import TINY, folder, here, small_words


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

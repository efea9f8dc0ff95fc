"""Stores of other places: local copies of URLs, uploads, and words that write them."""

import json
import shutil
import sys
import time
from pathlib import Path

import fsspec
import pytest
import safetensors

from kd.config.components import typed
from kd.config.compose import composed
from kd.store import __main__ as store_main
from kd.store import transfer
from kd.store.reader import Store
from kd.system import files
from kd.system.remote import Remote, local_root
from tests.refusals import refused
from tests.small import TOP, content, folder, here, outcome, write
from tests.store.damage import DAMAGE, OFFLINE, SHARDS, flip, only, refusal, times


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

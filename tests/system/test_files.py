"""Atomic writing: a file appears whole or not at all, and damage to it shows in its digest."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd.data import corpora
from kd.errors import UserError
from kd.system import files, remote
from kd.system.checkpoint_files import DigestIO
from tests.refusals import refused

FORK = multiprocessing.get_context("fork")


def fill(path: Path, folder: bool, text: str) -> None:
    """A file with that text, or a folder with a file and a folder of it."""
    if not folder:
        path.write_text(text)
        return
    (path / "sub").mkdir(parents=True)
    (path / f"{text}.txt").write_text(text)
    (path / "sub" / "b.txt").write_text(text)


def content(path: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden files too."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


both = pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])


@both
@pytest.mark.parametrize("old", [False, True])
def test_what_is_written_takes_the_place_of_the_old(tmp_path, folder, old):
    path, expected = tmp_path / "a" / "b" / "made", tmp_path / "expected"
    fill(expected, folder, "new")
    if old:
        path.parent.mkdir(parents=True)
        fill(path, folder, "old")
    before = content(tmp_path)
    with files.atomic(path) as temporary:
        fill(temporary, folder, "new")
        assert temporary.parent == path.parent  # a rename is atomic within one file system alone
        assert content(tmp_path).items() > before.items()
    assert [p.name for p in path.parent.iterdir()] == ["made"]
    assert content(path) == content(expected) if folder else path.read_text() == "new"


@both
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_error_inside_leaves_what_was_there(tmp_path, folder, old, error):
    if old:
        fill(tmp_path / "made", folder, "old")
    before = content(tmp_path)
    with pytest.raises(error), files.atomic(tmp_path / "made") as temporary:
        fill(temporary, folder, "new")
        raise error
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == old


def die(path: Path, folder: bool) -> None:
    with files.atomic(path) as temporary:
        fill(temporary, folder, "new")
        os.kill(os.getpid(), signal.SIGKILL)


@both
def test_kill_inside_leaves_what_was_there(tmp_path, folder):
    fill(tmp_path / "made", folder, "old")
    before = content(tmp_path)
    process = FORK.Process(target=die, args=(tmp_path / "made", folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {k: v for k, v in content(tmp_path).items() if ".tmp" not in k} == before
    with files.atomic(tmp_path / "made") as temporary:
        fill(temporary, folder, "newer")
    assert "old" not in str(content(tmp_path))


def test_two_writers_of_a_name_are_in_no_way_of_each_other_though_their_ids_are_the_same(tmp_path):
    """Write from two processes with one id, as on two hosts."""
    with files.atomic(tmp_path / "made") as one, files.atomic(tmp_path / "made") as other:
        one.write_text("one")
        other.write_text("other")
    assert content(tmp_path).keys() == {"made"} and (tmp_path / "made").read_text() == "one"


def test_content_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    real = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real[0](fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), real[1](a, b)))
    with files.atomic(tmp_path / "made") as temporary:
        fill(temporary, True, "new")
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    assert {str(temporary / "new.txt"), str(temporary / "sub" / "b.txt")} <= set(before) and after == [str(tmp_path)]


# A full disk: in a process of its own, files may not grow beyond 64 kB.

BIG = {"weights": torch.zeros(1 << 20)}


def as_text(path: Path) -> None:
    files.write_json(path, ["x" * (1 << 20)])


def as_array(path: Path) -> None:
    with files.atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.zeros(1 << 20))


def as_checkpoint(path: Path) -> None:
    DigestIO().save_checkpoint(BIG, path)


def as_safetensors(path: Path) -> None:
    with files.atomic(path) as temporary:
        save_file(BIG, temporary)


def as_folder(path: Path) -> None:
    with files.atomic(path) as temporary:
        fill(temporary, True, "new")
        save_file(BIG, temporary / "model.safetensors")


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


@pytest.mark.parametrize(
    "write",
    [as_text, as_checkpoint, as_safetensors, as_folder, as_array],
)  # fmt: skip
def test_full_disk_is_said_and_the_old_file_stays(tmp_path, write):
    path = tmp_path / "step-1.ckpt"
    fill(path, write is as_folder, "old")
    before = content(tmp_path)
    with FORK.Pool(1, limit) as pool, refused(option=path, why="the disk is full", hint="root=/other"):
        pool.apply(write, (path,))
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), OSError("80 requested and 3 written"),
     OSError("Not enough free space to write 80 bytes after offset 0")],
)  # fmt: skip
def test_full_disk_is_known_by_what_libraries_say(tmp_path, error):
    with refused(option=tmp_path / "made", why="the disk is full"), files.atomic(tmp_path / "made"):
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("bad"), PermissionError(13, "denied"), UserError("no"),
     ValueError("2 requested and 1 found")],
)  # fmt: skip
def test_other_errors_are_no_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as caught, files.atomic(tmp_path / "made"):
        raise error
    assert caught.value is error


def test_json_is_read_back_and_nan_is_refused(tmp_path):
    value = {"a": [1, 2.5, None, "ä"], "b": {"c": True}}
    files.write_json(tmp_path / "x.json", value)
    for wrong in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(tmp_path / "x.json", {"a": wrong})
    assert json.loads((tmp_path / "x.json").read_text()) == value and len(list(tmp_path.iterdir())) == 1


def test_digest_changes_with_any_byte_and_with_the_length(tmp_path):
    file = tmp_path / "x"

    def digest(data: bytes) -> str:
        file.write_bytes(data)
        return files.digest(file)

    small = bytes(range(256))
    assert digest(small) == digest(small)
    digests = [digest(small[:i] + bytes([small[i] ^ 1]) + small[i + 1 :]) for i in range(256)]
    digests += [digest(small), digest(small[:-1]), digest(small + b"\0"), digest(b""), digest(b"\0")]
    assert len(set(digests)) == len(digests)


def test_digest_reads_all_of_a_large_file(tmp_path):
    file, size = tmp_path / "x", (1 << 22) * 2 + 5  # several blocks
    file.write_bytes(bytes(size))
    digests = {files.digest(file)}
    for place in (0, (1 << 22) - 1, 1 << 22, size - 6, size - 1):
        with open(file, "r+b") as f:
            f.seek(place)
            f.write(b"\1")
        digests.add(files.digest(file))
    assert len(digests) == 6


@pytest.mark.parametrize("folder", ["a file", "below a file", "/proc/kd"])
def test_a_cache_that_cannot_be_written_is_said_with_what_to_type(tmp_path, monkeypatch, folder):
    (tmp_path / "file").write_text("")
    cache = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "kd"}.get(folder, folder)
    monkeypatch.setenv("KD_CACHE", str(cache))
    with refused(option=cache, need="a folder that can be written", hint="type KD_CACHE=/other/folder"):
        remote.local_root("memory://bucket/runs")
    assert remote.local_root(tmp_path) == tmp_path
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    with refused(option=cache, need="a folder that can be written", hint="type HF_HOME=/other/folder"):
        list(corpora.text(str(tmp_path / "a.txt")).load())


# Content of what is known by its path.


def rewrite(path: Path, content: bytes) -> None:
    """Change a file as a copy with preserved times does: the same size and mtime."""
    old = path.stat()
    assert len(content) == old.st_size
    path.write_bytes(content)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A folder with a large file and small ones; a change is taken to be old at once."""
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SETTLED", -1)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(files.LARGE))
    (folder / "config.json").write_bytes(b"12")
    (folder / "sub" / "x").write_bytes(b"34")
    return folder


@pytest.mark.parametrize("name", ["weights", "config.json", "sub/x"])
def test_an_edit_of_the_same_size_and_time_changes_the_stamp_and_a_new_time_does_not(model, name):
    path = model / name
    before, content = files.folder_fingerprint(str(model)), path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert files.folder_fingerprint(str(model)) == before
    rewrite(path, content[:-1] + b"\1")
    changed = files.folder_fingerprint(str(model))
    assert changed != before
    rewrite(path, content)
    assert files.folder_fingerprint(str(model)) == before
    path.rename(path.with_name("other"))
    assert files.folder_fingerprint(str(model)) not in (before, changed)


def test_a_stamp_is_of_visible_files_wherever_they_are(model, tmp_path):
    before = files.folder_fingerprint(str(model))
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / ".cache").mkdir()
    (tmp_path / "copy" / ".cache" / "note").write_text("downloaded today")
    assert files.folder_fingerprint(str(tmp_path / "copy")) == before
    assert (
        files.folder_fingerprint(str(model / "config.json"))
        is files.folder_fingerprint("a/name")
        is files.folder_fingerprint(None)
        is None
    )


def test_large_files_are_read_once(model, monkeypatch):
    real, read = files.digest, []
    monkeypatch.setattr(files, "digest", lambda path: (read.append(Path(path).name), real(path))[1])
    one = files.folder_fingerprint(str(model))
    assert files.folder_fingerprint(str(model)) == one and read.count("weights") == 1
    (note,) = (model.parent / "cache" / "digests").iterdir()
    note.write_text("[]")
    assert files.folder_fingerprint(str(model)) == one and read.count("weights") == 2
    monkeypatch.setattr(files, "SETTLED", 3600)  # changed just now: it could change once more within a clock tick
    (model / "weights").write_bytes(bytes(files.LARGE))
    assert (
        files.folder_fingerprint(str(model)) == one == files.folder_fingerprint(str(model))
        and read.count("weights") == 4
    )


def test_a_cache_that_cannot_be_written_is_done_without(model, monkeypatch):
    (model.parent / "file").touch()
    monkeypatch.setenv("KD_CACHE", str(model.parent / "file" / "cache"))
    assert files.folder_fingerprint(str(model)) == files.folder_fingerprint(str(model))

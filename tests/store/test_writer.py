"""A store is written once, whoever is killed and however many write it, and comes out the same byte for byte."""

import math
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kd.errors import UserError
from kd.experiment import stores
from kd.models import causal_lm
from kd.store import cost, rows, transfer, writer
from kd.store.reader import Store
from kd.system import files
from tests.refusals import refused
from tests.small import FORK, TOP, content, folder, here, result, type_in, write

OFFLINE = ("logits=offline", *TOP)
FILES = ["head", *(f"shard-{n:05}" for n in range(8)), "validation"]


@pytest.fixture
def root(trained_root, tmp_path) -> Path:
    """A root with data and teacher, and no store."""
    shutil.copytree(trained_root, tmp_path / "root", ignore=shutil.ignore_patterns("stores"))
    return tmp_path / "root"


@pytest.fixture
def clean(trained_root) -> dict[str, bytes]:
    """Return the expected files of the store."""
    (store,) = (trained_root / "stores").iterdir()
    return content(store)


def store_of(root: Path) -> Path:
    (store,) = (root / "stores").iterdir()
    return store


def shards(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in contents.items() if name.endswith(".safetensors")}


def times(path: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in path.glob("*.safetensors")}


def at_once(count: int, task: Callable[[int], object]) -> list[int]:
    """Exit codes of `count` processes that do task(number)."""
    processes = [FORK.Process(target=task, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def watched(log: Path, before: Callable[[int], None] = lambda count: None) -> None:
    """Note in a file which process saves what; `before` is told how much it has saved."""
    real, count = rows.save_tensors, 0

    def save(tensors, where, name, **note) -> None:
        nonlocal count
        before(count)
        count += 1
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {name}\n")
        real(tensors, where, name, **note)

    rows.save_tensors = save


def saved(log: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split()) for line in log.read_text().splitlines()]


def test_two_writers_of_a_store_write_the_same_bytes(root, clean):
    write(root, *TOP)
    assert shards(content(store_of(root))) == shards(clean)
    assert sorted(shards(clean)) == [f"{name}.safetensors" for name in FILES]


@pytest.mark.parametrize("moment", [1, 3, 6, 13, 21, 22])
def test_killed_anywhere_goes_on_with_what_is_missing(root, clean, moment):
    """Within the writing of the file of that number: begun, and each of the others with its note, then the manifest."""

    def die(_: int) -> None:
        real, count = files.sync, 0

        def sync(path: Path) -> None:
            nonlocal count
            count += path.name.endswith(".tmp")
            if count == moment and (root / "stores") in path.parents:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)

        files.sync = sync
        write(root, *TOP)

    assert at_once(1, die) == [-signal.SIGKILL]
    path = store_of(root)
    times_before = times(path)
    assert not (path / "manifest.json").exists() and len(times_before) == max(0, moment - 1) // 2
    noted = {name: when for name, when in times_before.items() if (path / name).with_suffix(".json").exists()}
    write(root, *TOP)
    assert shards(content(path)) == shards(clean)
    assert times(path).items() >= noted.items()
    assert not list(path.glob(".*.safetensors.*.tmp")) and Store(path, path.parent).verify() is None


few_or_many = pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])


@few_or_many
def test_processes_that_want_a_missing_store_write_it_once(root, clean, tmp_path, count):
    def want(number: int) -> None:
        watched(tmp_path / "log")
        here(root, *OFFLINE, f"seed={number}", "trainer.steps=2")

    assert at_once(count, want) == [0] * count
    names = [name for _, name in saved(tmp_path / "log")]
    assert sorted(names) == FILES and len({pid for pid, _ in saved(tmp_path / "log")}) == 1
    assert shards(content(store_of(root))) == shards(clean)
    runs = [result(p) for p in root.glob("fkl*")]
    assert len(runs) == count and len({r["final"]["val/teacher_lm"] for r in runs}) == 1


@few_or_many
def test_processes_with_one_run_end_with_one_result(root, tmp_path, count):
    def want(_: int) -> None:
        watched(tmp_path / "log")
        assert result(here(root, *OFFLINE, "trainer.steps=2"))["state"] == "done"

    assert at_once(count, want) == [0] * count
    assert sorted(name for _, name in saved(tmp_path / "log")) == FILES
    assert len((folder(root, "fkl") / "metrics.jsonl").read_text().splitlines()) == 3


def test_writers_share_the_work(root, clean, tmp_path):
    def share(_: int) -> None:
        watched(tmp_path / "log", lambda count: time.sleep(0.05))
        write(root, *TOP)

    assert at_once(3, share) == [0] * 3
    assert sorted(name for _, name in saved(tmp_path / "log")) == FILES
    assert len({pid for pid, _ in saved(tmp_path / "log")}) > 1
    assert shards(content(store_of(root))) == shards(clean)


def test_a_writer_takes_over_from_one_that_is_killed(root, clean, tmp_path):
    def share(number: int) -> None:
        def before(count: int) -> None:
            time.sleep(0.05)
            if number == 0 and count == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        watched(tmp_path / "log", before)
        write(root, *TOP)

    assert at_once(2, share) == [-signal.SIGKILL, 0]
    assert shards(content(store_of(root))) == shards(clean)


# Machines that share no disk


@pytest.fixture
def parts(root, tmp_path) -> list[Path]:
    paths = [tmp_path / "one", tmp_path / "two"]
    for number, path in enumerate(paths, 1):
        assert write(root, *TOP, f"part={number}/2", f"logits.path={path}") is None
    return paths


def test_parts_are_merged_to_what_one_machine_writes(root, clean, parts, tmp_path):
    written = [set(shards(content(path))) for path in parts]
    assert not written[0] & written[1] and all(len(names) > 3 for names in written)
    assert not any((path / "manifest.json").exists() for path in parts)
    transfer.merge(tmp_path / "whole", parts)
    merged = content(tmp_path / "whole")
    assert shards(merged) == shards(clean)
    assert {n: d for n, d in merged.items() if n.startswith("shard")}.items() <= clean.items()
    here(root, *OFFLINE, f"logits.path={tmp_path / 'whole'}")
    assert not (root / "stores").exists()


def merging(parts: list[Path], tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        transfer.merge(tmp_path / "whole", parts)
    assert not (tmp_path / "whole" / "manifest.json").exists()
    return str(caught.value)


def test_a_part_that_is_missing(parts, tmp_path):
    assert "shard-00001.safetensors" in merging(parts[:1], tmp_path)
    message = merging(parts[1:], tmp_path)
    assert "6 files are in none of the parts" in message and "head.safetensors" in message


def test_a_shard_that_is_missing_from_a_part(parts, tmp_path):
    (parts[0] / "shard-00002.safetensors").unlink()
    assert "shard-00002.safetensors" in merging(parts, tmp_path)


def test_a_damaged_part_is_refused_by_file_and_the_whole_one_is_taken(parts, tmp_path, clean):
    path = parts[1] / "shard-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{path} is damaged" in merging(parts, tmp_path)
    path.write_bytes(whole)
    transfer.merge(tmp_path / "whole", parts)
    assert shards(content(tmp_path / "whole")) == shards(clean)


def test_parts_of_different_stores_are_not_merged(root, parts, tmp_path):
    write(root, "truncation=top_k", "truncation.k=4", "part=2/2", f"logits.path={tmp_path / 'other'}")
    message = merging([parts[0], tmp_path / "other"], tmp_path)
    assert "its truncation is top_k k=5, and here it is top_k k=4" in message
    assert "no part of a store" in merging([parts[0], root / "data"], tmp_path / "elsewhere")


@pytest.mark.parametrize("part", ["part=0/2", "part=3/2", "part=1", "part=a/b", "part=-1/2"])
def test_a_part_that_cannot_be(root, part):
    with refused(option="part", got=part.removeprefix("part="), hint="part=1/2"):
        write(root, *TOP, part)


# No room


def test_no_room_is_said_before_anything_is_written(root, clean, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 70_000))
        with refused(why=("has no room for the store: 1,920 tokens ", " 70 kB are free"), hint="top_k") as caught:
            write(root, "truncation=full")
        assert caught.value.option == str(store_of(root)) and not list(store_of(root).glob("*.safetensors"))
    shutil.rmtree(root / "stores")
    write(root, *TOP)
    assert shards(content(store_of(root))) == shards(clean)


def test_the_estimate_is_what_the_store_takes(tmp_path, monkeypatch):
    for words in (TOP, ("truncation=random",), ("truncation=full",)):  # of one teacher
        printed = []
        monkeypatch.setattr(cost.console, "print", lambda *text, to=printed, **_: to.extend(text))
        held = write(tmp_path, *words, "data.tokens=20000")
        amounts = [float(n) * {"kB": 1e3, "MB": 1e6}[unit] for n, unit in re.findall(r"([\d.]+) (kB|MB)", printed[0])]
        taken = sum(note["size"] for note in held.manifest["files"].values())
        assert amounts[0] + amounts[1] == pytest.approx(taken, rel=0.1), words


@pytest.mark.parametrize("words", [TOP, ("truncation=full",)], ids=lambda w: w[0])
def test_nothing_is_stored_of_a_teacher_that_says_nan(root, words, monkeypatch):
    real = causal_lm.CausalLM.hidden_states
    monkeypatch.setattr(causal_lm.CausalLM, "hidden_states", lambda self, ids: real(self, ids) * math.nan)
    monkeypatch.setattr(causal_lm.CausalLM, "check", lambda self, option: None)
    with refused(option="teacher", why="row 0 of the data, in fp32", hint="trainer.precision=fp32"):
        write(root, *words, f"logits.path={root / 'store'}")
    assert not list((root / "store").glob("*.safetensors"))


def test_a_beginning_cut_into_other_shards_is_not_gone_on_with(root, monkeypatch):
    write(root, *TOP)
    (store_of(root) / "manifest.json").unlink()
    (store_of(root) / "shard-00000.safetensors").unlink()
    monkeypatch.setattr(writer, "SHARDS", 3)
    with refused(option=store_of(root), why="other shards") as caught:
        write(root, *TOP)
    type_in(str(caught.value))
    assert len(write(root, *TOP).shards) == 3


def test_a_disk_that_is_full_half_way(root, clean, tmp_path):
    def fill(count: int) -> None:
        if count == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    def run(_: int) -> None:
        watched(tmp_path / "log", fill)
        with suppress(UserError):
            write(root, *TOP)
            os._exit(1)
        os._exit(0)

    assert at_once(1, run) == [0]
    path = store_of(root)
    times_before = times(path)
    assert len(times_before) == 5 and not list(path.glob(".*.tmp")) and not (path / "manifest.json").exists()
    write(root, *TOP)
    assert times(path).items() >= times_before.items() and shards(content(path)) == shards(clean)


# What is written


def test_a_store_says_what_plain_transformers_does(root):
    held = write(root, *TOP)
    model = AutoModelForCausalLM.from_pretrained(folder(root, "lm") / "student").eval()
    rows = np.load(next((root / "data").glob("*/train.npy")))
    index = np.array([59, 0, 30])
    ids = torch.from_numpy(rows[index, :-1].astype(np.int64))
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1).flatten(0, 1)
    zeros = torch.zeros(len(logp), dtype=torch.long)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    target = held.read(index, ids.numpy()).at(everywhere).target(slice(None), zeros, zeros, None)
    top, columns = logp.topk(5)
    assert (target.ids == columns.sort(-1).values).all()
    assert target.logp.exp().sum(-1).numpy() == pytest.approx(top.exp().sum(-1).numpy(), rel=2e-3)
    assert (target.logp - logp.gather(-1, target.ids)).abs().max() < 1 / 32 + 1e-3


def test_draws_of_a_store_depend_on_its_seed_and_not_on_batches(root, tmp_path):
    words = ("truncation=random", "truncation.draws=8")
    stores = [write(root, *words, f"logits.path={tmp_path / name}", *more)
            for name, more in (("a", ()), ("b", ("trainer.micro_batch=7",)), ("c", ("logits.seed=1",)))]  # fmt: skip
    contents = [shards(content(Path(m.path))) for m in stores]
    assert contents[0] == contents[1]
    assert all(contents[2][f"shard-{n:05}.safetensors"] != contents[0][f"shard-{n:05}.safetensors"] for n in range(8))
    assert contents[2]["validation.safetensors"] == contents[0]["validation.safetensors"]


def test_the_words_of_a_store_name_the_tokenizer_that_a_student_brought(root, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "corpus", lambda settings: (None, {"tokenizer": "gpt2"}))
    assert "data.tokenizer=gpt2" in write(root, *TOP, f"logits.path={tmp_path / 'made'}").words

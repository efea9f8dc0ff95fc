"""Damage to a store is named, and what is printed mends it."""

import contextlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from kd.errors import UserError
from kd.store.reader import Store
from tests.refusals import refused
from tests.small import content, here, python, train, type_in
from tests.store.damage import CASES, DAMAGE, OFFLINE, SHARDS, change_number, flip, only, refusal, times


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

"""Folders that are filled once: by one of several threads, and never half."""

import threading
import time

import pytest

from kd.system import sealed_folder
from tests.refusals import refused


def test_one_of_several_threads_fills_a_folder_and_the_others_wait(tmp_path):
    calls = []

    def make(temporary):
        calls.append(temporary)
        temporary.mkdir()
        (temporary / "a.txt").write_text("a")
        time.sleep(0.2)
        sealed_folder.write_manifest(temporary, {"name": "one"})

    threads = [threading.Thread(target=sealed_folder.fill_once, args=(tmp_path / "x", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sealed_folder.read_manifest(tmp_path / "x", "the text")["name"] == "one"


def test_folder_whose_making_fails_does_not_exist(tmp_path):
    def make(temporary):
        temporary.mkdir()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        sealed_folder.fill_once(tmp_path / "x", make)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", ["a.txt", "manifest.json"])
def test_changed_file_is_refused(tmp_path, change):
    (tmp_path / "a.txt").write_text("a")
    sealed_folder.write_manifest(tmp_path, {"name": "one"})
    (tmp_path / change).write_text('{"name": "two"}')
    with refused(option=str(tmp_path / change), hint="remove the text", commands=str(tmp_path)):
        sealed_folder.read_manifest(tmp_path, "the text")

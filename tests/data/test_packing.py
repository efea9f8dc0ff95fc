"""Packed data on disk: made once, whole or not at all, and refused if damaged."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kd.data import packing, tokenizer
from kd.data.corpora import Corpus
from kd.data.tokenizer import END
from tests.data.texts import FORK, NO_VOCAB, SETTINGS, content, corpus, documents
from tests.refusals import refused


def test_same_documents_give_the_same_bytes_in_any_order(packed, tmp_path):
    again = packing.pack(corpus(documents()[::-1]), tmp_path, **SETTINGS)
    assert again.folder.name == packed.folder.name and content(again.folder) == content(packed.folder)


def test_packed_data_is_not_made_again(packed, tmp_path):
    def never():
        raise AssertionError("was read again")

    packed_data = packing.pack(Corpus(never, {"texts": sorted(documents())}), packed.folder.parent, **SETTINGS)
    assert (
        packed_data.folder == packed.folder
        and (packed_data.train == packed.train).all()
        and (packed_data.val == packed.val).all()
    )


def test_whatever_changes_the_rows_changes_the_folder(packed, tmp_path):
    texts = documents()
    folders = [
        packed.folder.name,
        packing.pack(corpus([*texts[:-1], texts[-1] + "x"]), tmp_path, **SETTINGS).folder.name,
    ]
    for change in ({"seq_len": 15}, {"vocab": 281}, {"val_rows": 4}, {"val_share": 0.3}, {"tokens": 2000}):
        folders.append(packing.pack(corpus(texts), tmp_path, **SETTINGS | change).folder.name)
    assert len(set(folders)) == len(folders) == 7


def test_ids_with_holes_are_no_smaller_vocabulary(packed, tmp_path):
    """Leave ids unused, as a tokenizer with removed tokens: the largest id counts, not the number of tokens."""
    fast = PreTrainedTokenizerFast.from_pretrained(packed.tokenizer)
    state = json.loads(fast.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["w"] = 70_000
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    changed.save_pretrained(tmp_path / "tokenizer")
    packed_data = packing.pack(corpus(documents()), tmp_path, tokenizer=str(tmp_path / "tokenizer"), **NO_VOCAB)
    assert tokenizer.vocabulary_size(changed) == 70_001 > len(changed)
    assert json.loads((packed_data.folder / "manifest.json").read_text())["vocab"] == 70_001
    assert packed_data.train.dtype == np.uint32 and packed_data.train.max() == 70_000


def test_changed_tokenizer_of_a_folder_gives_another_folder(packed, tmp_path):
    settings = {k: v for k, v in SETTINGS.items() if k != "vocab"} | {"tokenizer": str(tmp_path / "tokenizer")}
    other = packing.pack(corpus(documents(seed=1)), tmp_path, **SETTINGS)
    shutil.copytree(packed.tokenizer, tmp_path / "tokenizer")
    before = packing.pack(corpus(documents()), tmp_path, **settings)
    shutil.copytree(other.tokenizer, tmp_path / "tokenizer", dirs_exist_ok=True)
    assert packing.pack(corpus(documents()), tmp_path, **settings).folder != before.folder


def test_two_processes_at_once_make_it_once_and_agree(packed, tmp_path):
    def slow():
        with open(tmp_path / "made", "a") as file:
            file.write("x")
        time.sleep(0.5)
        return documents()

    def work(name: str):
        packed_data = packing.pack(Corpus(slow, {"texts": sorted(documents())}), tmp_path / "data", **SETTINGS)
        (tmp_path / name).write_text(str(packed_data.train.sum()))

    processes = [FORK.Process(target=work, args=(name,)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "made").read_text() == "x"
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == str(packed.train.sum())
    assert content(tmp_path / "data" / packed.folder.name) == content(packed.folder)


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "shorter", "longer", "gone"])
def test_damaged_file_is_named(packed, cache, name, damage):
    file = cache / packed.folder.name / name
    whole = file.read_bytes()
    place = {"first": 0, "middle": len(whole) // 2, "last": len(whole) - 1}.get(damage, 0)
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    file.write_bytes({"shorter": whole[:-34], "longer": whole + whole[-34:]}.get(damage, flipped))
    if damage == "gone":
        file.unlink()
    with refused(option=file, why="is damaged", commands=f"rm -r {file.parents[name.count('/')]}"):
        packing.pack(corpus(documents()), cache, **SETTINGS)
    file.write_bytes(whole)
    packing.pack(corpus(documents()), cache, **SETTINGS)


def test_folder_without_a_manifest_is_made_anew(packed, cache):
    folder = cache / packed.folder.name
    (folder / "manifest.json").unlink()
    (folder / "val.npy").write_bytes(b"half")
    packing.pack(corpus(documents()), cache, **SETTINGS)
    assert content(folder) == content(packed.folder)


@pytest.mark.parametrize("damage", ["shorter", "digit", "no key", "empty"])
def test_damaged_manifest_is_named(packed, cache, damage):
    file = cache / packed.folder.name / "manifest.json"
    text = file.read_text()
    cut = {"shorter": text[:-20], "digit": text.replace('per_token": ', 'per_token": 1'), "empty": ""}
    entries = {k: v for k, v in json.loads(text).items() if k != "entropy"}
    file.write_text(cut.get(damage, json.dumps(entries)))
    with refused(option=file, why="is damaged", commands=f"rm -r {file.parent}"):
        packing.pack(corpus(documents()), cache, **SETTINGS)


WHERE = pytest.mark.parametrize(
    "where", ["packing._tokenizer", "text_rows.in_batches", "row_files.np.save", "packing.files.write_json"]
)


def killed(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)


@WHERE
def test_killed_packing_is_made_again_whole(packed, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(f"kd.data.{where}", killed)
        process = FORK.Process(target=packing.pack, args=(corpus(documents()), tmp_path), kwargs=SETTINGS)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / packed.folder.name).exists()
    assert content(packing.pack(corpus(documents()), tmp_path, **SETTINGS).folder) == content(packed.folder)


def test_killed_packing_leaves_nothing_for_ever(packed, tmp_path, monkeypatch):
    test_killed_packing_is_made_again_whole(packed, tmp_path, monkeypatch, "packing.files.write_json")
    assert {p.name for p in tmp_path.iterdir()} == {packed.folder.name, f"{packed.folder.name}.lock"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@WHERE
def test_packing_that_fails_leaves_nothing(packed, tmp_path, monkeypatch, where, error):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(f"kd.data.{where}", fail)
    with pytest.raises(error):
        packing.pack(corpus(documents()), tmp_path, **SETTINGS)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


# What cannot be packed


@pytest.mark.parametrize(
    "setting",
    [{"seq_len": 0}, {"seq_len": -1}, {"val_rows": 0}, {"tokens": -1}, {"vocab": 256}, {"val_share": 0.0},
     {"val_share": 1.0}, {"val_share": -0.1}, {"val_share": float("nan")}],
)  # fmt: skip
def test_setting_without_meaning_is_refused_by_name(tmp_path, setting):
    ((name, value),) = setting.items()
    with refused(option=f"data.{name}", got=value):
        packing.pack(corpus(documents()), tmp_path, **SETTINGS | setting)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_fewer_tokens_than_a_row_are_refused_by_name(tmp_path, tokens):
    with refused(option="data.tokens", got=tokens, need="at least 17, one row"):
        packing.pack(corpus(documents()), tmp_path, tokens=tokens, **SETTINGS)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("texts", [[], ["short"], documents(1)])
def test_text_too_short_for_a_row_on_each_side_is_refused(tmp_path, texts, streaming):
    with refused(need="17 tokens of each, one row", hint="data.seq_len=64"):
        packing.pack(corpus(texts, streaming=streaming), tmp_path, **SETTINGS)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]

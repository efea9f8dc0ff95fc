"""Corpora give the documents they should, are told apart by content, and name what they cannot read."""

import inspect
import json
import os
import socket
import time

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.data import corpora
from kd.system import network
from tests.refusals import refused

TEXTS = ["one\ntwo", "drei ä€😀", "four  spaces", "five"]


@pytest.fixture(autouse=True)
def calls(monkeypatch, tmp_path) -> list:
    """No network: connecting fails at once and is noted here. What the library finds out then is put back."""
    addresses = []

    def refuse(address, *args, **more):
        addresses.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    network.offline_unless_reachable.cache_clear()
    yield addresses
    network.offline_unless_reachable.cache_clear()


def write(path, texts=tuple(TEXTS), field="text"):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, field: t}) + "\n" for t in texts), encoding="utf-8")
    else:
        pq.write_table(pa.table({"id": [1] * len(texts), field: list(texts)}), path)
    return path


def read(path, **options) -> list[str]:
    return list(corpora.text(str(path), **options).load())


# Generated


def chain(seq_len: int = 100, length: int = 200_000, states: int = 12, branching: int = 4, seed: int = 0):
    return corpora.markov(seq_len, length, states, branching, seed)


def matrix(options: corpora.Corpus) -> np.ndarray:
    return inspect.getclosurevars(options.load).nonlocals["matrix"]


@pytest.mark.parametrize(("states", "branching", "seed"), [(9, 1, 0), (2, 2, 0), (12, 4, 0), (12, 4, 1), (50, 50, 2)])
def test_markov_entropy_is_that_of_its_matrix(states, branching, seed):
    corpus = chain(states=states, branching=branching, seed=seed)
    p = matrix(corpus)
    np.testing.assert_allclose(p.sum(1), 1)
    assert ((p > 0).sum(1) <= branching).all() and (p >= 0).all()
    assert (np.linalg.matrix_power(p + np.eye(states), states) > 0).all()  # every state leads to every other
    visits = np.mean([np.linalg.matrix_power(p, 4000 + i)[0] for i in range(states)], 0)  # averaged over a period
    assert corpus.entropy == pytest.approx(
        -sum((row[row > 0] * np.log(row[row > 0])).sum() * v for row, v in zip(p, visits))
    )


def test_markov_text_has_the_entropy_it_says():
    corpus = chain()
    rows = np.array([[int(w[1:]) for w in text.split()] for text in corpus.load()])
    pairs = np.zeros((12, 12))
    np.add.at(pairs, (rows[:, :-1], rows[:, 1:]), 1)
    share = pairs / pairs.sum(1, keepdims=True)
    empirical = -(pairs[pairs > 0] * np.log(share[pairs > 0])).sum() / pairs.sum()
    assert empirical == pytest.approx(corpus.entropy, abs=0.01)  # of 1.0; sampling error 0.002
    np.testing.assert_allclose(share, matrix(corpus), atol=0.02)
    # Stationary from the first token on.
    first, last = (np.bincount(rows[:, t], minlength=12) / len(rows) for t in (0, -1))
    np.testing.assert_allclose(first, last, atol=0.06)


def test_markov_documents_are_rows_of_its_words():
    corpus = chain(seq_len=9, length=1001)
    texts = corpus.load()
    assert len(texts) == 101 and all(len(t.split()) == 10 for t in texts)
    assert {w for t in texts for w in t.split()} <= set(corpus.words) and len(set(corpus.words)) == 12


def test_markov_is_a_function_of_its_settings():
    corpus = chain(seed=3, length=2000)
    assert corpus.load() == corpus.load() == chain(seed=3, length=2000).load()
    assert corpus.fingerprint == chain(seed=3, length=2000).fingerprint
    for other in ({"seed": 4}, {"states": 13}, {"branching": 5}, {"length": 3000}, {"seq_len": 99}):
        another = chain(**{"seed": 3, "length": 2000} | other)
        assert another.load() != corpus.load() and another.fingerprint != corpus.fingerprint
    assert not np.array_equal(matrix(chain(seed=4)), matrix(chain(seed=3)))


@pytest.mark.parametrize(
    ("options", "option"),
    [({"states": 1}, "states"), ({"branching": 0}, "branching"), ({"branching": 13}, "branching"),
     ({"length": 0}, "size")],
)  # fmt: skip
def test_markov_setting_without_meaning_is_refused_by_name(options, option):
    with refused(option=f"data.{option}", got=next(iter(options.values()))):
        chain(**options)


def test_python_is_source_and_is_told_apart_by_content(monkeypatch, tmp_path):
    corpus = corpora.python()
    texts = corpus.load()
    assert len(texts) > 300 and sum(map(len, texts)) > 3e6 and inspect.getsource(json) in texts
    assert corpus.fingerprint == corpora.python().fingerprint
    for name, text in (("a.py", "x = 1\n"), ("test/b.py", "no"), ("site-packages/c.py", "no"), ("d.txt", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert corpora.python().load() == ["x = 1\n"]
    before = corpora.python().fingerprint
    (tmp_path / "a.py").write_text("x = 2\n")
    assert corpora.python().fingerprint != before != corpus.fingerprint


# Local files


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    assert read(write(tmp_path / name)) == TEXTS


def test_pattern_takes_all_files_in_order(tmp_path):
    for name, text in (("b", "two"), ("a", "one"), ("c/d", "three")):
        write(tmp_path / f"{name}.txt", [text])
    (tmp_path / "other.md").write_text("no")
    assert read(tmp_path / "*.txt") == ["one", "two"]
    assert read(tmp_path / "**" / "*.txt") == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_field_names_the_text(tmp_path, name):
    write(tmp_path / name, field="body")
    assert read(tmp_path / name, field="body") == TEXTS
    with refused(option="data.files", got=tmp_path / name, why=("'text'", "id, body"), hint="type data.field="):
        read(tmp_path / name)


def test_sample_by_says_what_a_document_is(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\nthree")
    assert read(file, sample_by="line") == ["one", "two", "", "three"]
    assert read(file, sample_by="paragraph") == ["one\ntwo", "three"]
    assert read(file, sample_by="document") == ["one\ntwo\n\nthree"]
    with refused(option="data.sample_by", got="page", need="paragraph, line or document"):
        read(file, sample_by="page")


def test_changed_file_is_another_corpus(tmp_path):
    file = write(tmp_path / "a.txt")
    before = corpora.text(str(file))
    assert corpora.text(str(file)).fingerprint == before.fingerprint
    assert corpora.text(str(file), sample_by="line").fingerprint != before.fingerprint
    file.write_text("other")
    after = corpora.text(str(file))
    assert after.fingerprint != before.fingerprint and list(after.load()) == ["other"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none/*.txt", None, "no such file"),
        ("none.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("image.txt", b"\x89PNG\0\0", "is binary"),
        ("utf16.txt", "text".encode("utf-16"), "is binary"),
        ("a.csv", b"a,b", "files of .csv"),
        ("noending", b"a", "files of no ending"),
        ("latin.txt", "é".encode("latin-1") * 9, ("could not be read as text", "utf-8")),
        ("broken.jsonl", b'{"text": "a\n{"te', "could not be read as json"),
        ("blank.jsonl", b"\n \n", "no row with a named column"),
        ("none.json", b"[]", "no row with a named column"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "could not be read as json"),
    ],
)
def test_file_that_cannot_be_read_is_named(tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(option="data.files", got=tmp_path / name, why=why):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("fake.parquet", b"hello"),
        ("latin.jsonl", b'{"text": "\xe9"}\n'),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n'),
        ("number.jsonl", b'{"text": 1}\n'),
        ("nested.jsonl", b'{"text": {"a": "b"}}\n'),
        ("folder.txt", None),
    ],
)
def test_file_without_text_in_it_is_named(tmp_path, name, content):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with refused(option="data.files", got=tmp_path / name):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("source", ["files", "folder", "stream"])
def test_row_without_text_is_named_by_its_number(tmp_path, name, source):
    write(tmp_path / "set" / name, ["one", "two", None])
    place = "line 3" if (source, name) == ("files", "a.jsonl") else "row 3"
    folder = str(tmp_path / "set")
    corpus = (
        corpora.text(f"{folder}/{name}") if source == "files" else corpora.hub(folder, streaming=source == "stream")
    )
    with refused(why=f"in {place}, column 'text' holds NoneType", need="text in each row", hint="type data.field="):
        list(corpus.load())


def test_files_of_different_kinds_are_refused(tmp_path):
    write(tmp_path / "a.txt"), write(tmp_path / "a.jsonl")
    with refused(option="data.files", why=".jsonl, .txt", need="files of one kind"):
        read(tmp_path / "a.*")


# Hugging Face datasets


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reads_a_local_folder(tmp_path, name, streaming):
    write(tmp_path / "set" / name)
    corpus = corpora.hub(str(tmp_path / "set"), streaming=streaming)
    assert list(corpus.load()) == list(corpus.load()) == TEXTS and corpus.streaming == streaming


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("options", "fields"),
    [({"split": "nope"}, {"conflict": "data.split=nope"}), ({"subset": "nope"}, {"conflict": "data.subset=nope"}),
     ({"field": "nope"}, {"why": "no column 'nope'", "hint": "data.field"})],
)  # fmt: skip
def test_hub_names_the_wrong_setting(tmp_path, options, fields, streaming):
    write(tmp_path / "set" / "train.jsonl")
    with refused(option="data.name", got=tmp_path / "set", **fields):
        corpora.hub(str(tmp_path / "set"), streaming=streaming, **options).load()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("content", [b'{"text": "a\n{"te', b""])
def test_hub_names_a_folder_that_cannot_be_read(tmp_path, content, streaming):
    write(tmp_path / "set" / "train.jsonl").write_bytes(content)
    with refused(option="data.name", got=tmp_path / "set"):
        list(corpora.hub(str(tmp_path / "set"), streaming=streaming).load())


@pytest.mark.parametrize("what", ["content", "streaming"])
def test_hub_is_another_corpus_when_its_documents_or_their_order_change(tmp_path, what):
    folder = write(tmp_path / "set" / "train.jsonl").parent
    before = corpora.hub(str(folder)).fingerprint
    if what == "content":
        write(folder / "train.jsonl", ["other"])
    assert corpora.hub(str(folder), streaming=what == "content").fingerprint != before


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_without_a_network_says_so_at_once(calls, streaming):
    began = time.monotonic()
    with refused(option="data.name", got="roneneldan/TinyStories", hint="check the name and the network"):
        corpora.hub("roneneldan/TinyStories", streaming=streaming).load()
    assert time.monotonic() - began < 5
    assert calls == [("huggingface.co", 443)]  # asked once, then never again


def test_hub_needs_a_name():
    with refused(option="data.name", need="the name of a dataset", hint="data.name=roneneldan/TinyStories"):
        corpora.hub("")


def test_offline_is_for_all_libraries_and_only_where_nothing_answers(calls, monkeypatch):
    offline = lambda: [m.HF_HUB_OFFLINE for m in (datasets.config, huggingface_hub.constants)]  # noqa: E731
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    network.offline_unless_reachable()
    assert offline() == [False, False] and not calls  # what a proxy reaches is not for us to say
    monkeypatch.delenv("HTTPS_PROXY")
    network.offline_unless_reachable.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", lambda *args, **more: socket.socket())
        network.offline_unless_reachable()
    assert offline() == [False, False]
    network.offline_unless_reachable.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080")
    network.offline_unless_reachable()
    assert offline() == [True, True] and calls == [("mirror", 8080)]
    assert os.environ["HF_HUB_OFFLINE"] == "1"

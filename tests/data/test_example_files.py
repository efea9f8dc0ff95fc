"""Examples are read from files of any shape."""

import pytest

from kd.data import instructions, packing
from tests.data.examples import DOLLY, ONE, ROWS, TWO, Short, load, read, short, write
from tests.data.examples import cache as cache
from tests.refusals import refused


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_shape_is_known_by_its_columns(tmp_path, row, kind):
    assert read(write(tmp_path / f"a.{kind}", row[0], row[0])) == [row[1], row[1]]


def test_a_list_in_a_file_is_read_as_lines_are(tmp_path):
    assert read(write(tmp_path / "a.json", DOLLY, DOLLY)) == [ROWS["dolly"][1]] * 2


def test_a_pattern_takes_all_files(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", {"prompt": name, "response": "r"})
    assert [e.turns[0][1] for e in read(tmp_path / "*.jsonl")] == ["a", "b"]


def test_a_dataset_of_the_hub_is_read_from_a_folder(tmp_path):
    folder = write(tmp_path / "set" / "train.jsonl", DOLLY).parent
    corpus = instructions.instructions(64, name=str(folder))
    assert [*map(short, corpus.load())] == [ROWS["dolly"][1]] and len(corpus.load()) == 1
    before = corpus.fingerprint
    write(folder / "train.jsonl", DOLLY | {"response": "another"})
    assert instructions.instructions(64, name=str(folder)).fingerprint != before
    with refused(option="data.name", got=folder, conflict="data.split=nope"):
        instructions.instructions(64, name=str(folder), split="nope").load()


def test_columns_can_be_named(tmp_path):
    file = write(tmp_path / "a.jsonl", {"ask": "P", "say": "R", "prompt": "no", "response": "no", "chat": [ONE, TWO]})
    assert read(file, prompt="ask", response="say") == [Short((("user", "P"),), "R")]
    assert read(file, prompt="chat") == [Short((("user", "Hi"),), "Hello", True)]
    assert read(file, prompt="chat", response="say") == [Short((("user", "Hi"), ("assistant", "Hello")), "R", True)]


@pytest.mark.parametrize(
    ("columns", "fields"),
    [({}, {"why": "has the columns ask, say", "need": "instruction, context, response", "hint": "data.prompt=COLUMN"}),
     ({"prompt": "no", "response": "say"}, {"why": "the columns ask, say, and no 'no'", "hint": "data.prompt=ONE"}),
     ({"prompt": "ask", "response": "no"}, {"why": "the columns ask, say, and no 'no'", "hint": "data.response=ONE"}),
     ({"response": "say"}, {"conflict": "data.response=say", "why": "ask, say", "hint": "data.prompt="}),
     ({"prompt": "ask"}, {"why": ("'ask' is no list of messages", "ask, say"), "hint": "data.response=ONE_OF"})],
)  # fmt: skip
def test_wrong_columns_are_refused_with_those_there_are(tmp_path, columns, fields):
    file = write(tmp_path / "a.jsonl", {"ask": "P", "say": "R"})
    with refused(option="data.files", got=file, **fields):
        read(file, **columns)


@pytest.mark.parametrize(
    "row",
    [{"question": "1+1", "answer": 2}, {"question": ["a"], "answer": "b"}, {"prompt": {"a": 1}, "response": "b"},
     {"messages": [{"role": "user", "content": None}, TWO]}],
)  # fmt: skip
def test_a_column_without_text_is_named(tmp_path, row):
    with refused(option="data.files", need="text, or a list of messages") as caught:
        read(write(tmp_path / "a.jsonl", row))
    assert any(f"column '{name}' holds" in caught.value.why for name in row)


@pytest.mark.parametrize(
    ("options", "option", "fields"),
    [({"template": "llama"}, "template", {"need": "alpaca, chat or plain"}),
     ({"prompt_len": 0}, "prompt_len", {"need": "from 1 to data.seq_len=64"}), ({"prompt_len": 65}, "prompt_len", {}),
     ({"files": "a.jsonl", "name": "b"}, "files", {"conflict": "data.name=b"}),
     ({"prompt": "p"}, "prompt", {"why": "would do nothing without data.name=… or data.files="}),
     ({"split": "test", "files": "a.jsonl"}, "split", {"why": "would do nothing without data.name="}),
     ({"subset": "x"}, "subset", {"why": "would do nothing"}),
     ({"files": "none.jsonl"}, "files", {"why": "no such file", "hint": ".jsonl"}),
     ({"files": "none.csv"}, "files", {"why": "no such file"})],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(options, option, fields):
    with refused(option=f"data.{option}", got=options[option], **fields):
        instructions.instructions(64, **options)


def test_text_is_not_read_as_examples(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with refused(option="data.files", why="files of .txt", need="files of one kind, .jsonl, .json, .parquet"):
        instructions.instructions(64, files=str(tmp_path / "a.txt"))


def test_whatever_changes_the_examples_changes_the_corpus(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": "P", "response": "R", "other": "O"})
    changes = [{}, {"template": "plain"}, {"prompt_len": 5}, {"prompt": "prompt", "response": "other"}]
    corpora = [instructions.instructions(64, files=str(file), **change) for change in changes]
    assert corpora[0].fingerprint == instructions.instructions(64, files=str(file)).fingerprint
    assert len({packing.key(corpus) for corpus in corpora}) == len(corpora)
    assert [corpus.pairs.prompt_len for corpus in corpora] == [32, 32, 5, 32]


@pytest.mark.parametrize(
    ("kind", "place"), [("jsonl", "line 5 of {}"), ("json", "row 3 of {}"), ("parquet", "row 3 of {}")]
)
def test_a_row_that_cannot_be_read_is_named_with_its_file(tmp_path, kind, place):
    good = {"prompt": "P", "response": "R", "weight": 1.0}
    bad = good | {"weight": 0.5}
    write(tmp_path / f"a.{kind}", good)
    file = write(tmp_path / f"b.{kind}", good, good, bad, good)
    if kind == "jsonl":
        file.write_text(file.read_text().replace("\n", "\n\n"))
    why = "column 'weight' holds 0.5, and a row is learned as a whole"
    with refused(option="data.files", got=f"{tmp_path}/*.{kind}", why=f"in {place.format(file)}, {why}"):
        load(f"{tmp_path}/*.{kind}")
    with refused(option="data.files", got=file, why=f"in {place.removesuffix(' of {}')}, {why}"):
        load(file)
    with refused(why=f"in {place.removesuffix(' of {}')}, {why}"):
        instructions.instructions(64, files=str(file)).load()[2]

"""Errors for people: fields that are put into words in one place, and keep both across processes."""

import pickle

import pytest

from kd.errors import UserError, check, for_people, typed
from kd.runs.outcome import classify
from kd.system.retries import Unreachable
from tests.refusals import refused

WORDED = {
    "value": (
        {"option": "truncation.k", "got": 0, "need": "a number from 1 to 5", "hint": "type truncation.k=5"},
        "truncation.k=0: need a number from 1 to 5. Type truncation.k=5.",
    ),
    "reason and need": (
        {"option": "data.files=a.jsonl", "why": "column 'x' holds 3", "need": "text", "hint": "leave such rows out"},
        "data.files=a.jsonl: column 'x' holds 3; need text. Leave such rows out.",
    ),
    "predicate": (
        {"option": "lm", "got": "plain", "conflict": "logits=none", "why": "would do nothing"},
        "lm=plain with logits=none would do nothing.",
    ),
    "file and commands": (
        {"option": "/r/a=b.json", "why": "is damaged", "hint": "to make it again, type", "commands": ["rm -r /r", "x"]},
        "/r/a=b.json is damaged. To make it again, type:\n  rm -r /r\n  x",
    ),
    "several lines": (
        {"option": "run", "why": "ran out of memory: no\nmore", "hint": "type trainer.chunk=4"},
        "run ran out of memory: no\nmore.\nType trainer.chunk=4.",
    ),
    "no option": ({"why": "no node is free", "hint": "wait for one"}, "No node is free. Wait for one."),
    "a name in front": ({"why": "s3fs is missing", "hint": "x=1 mends it"}, "s3fs is missing. x=1 mends it."),
    "in one piece": ({"why": "two lines:\n  a line"}, "two lines:\n  a line"),
}


@pytest.mark.parametrize(("fields", "text"), WORDED.values(), ids=WORDED)
def test_fields_are_put_into_words(fields, text):
    assert str(UserError(**fields)) == text


@pytest.mark.parametrize("kind", [UserError, Unreachable])
def test_an_error_is_the_same_in_another_process(kind):
    error = kind(option="a", got=[1, None], need="b", hint="c", commands=["d"])
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is kind and str(other) == str(error) and vars(other) == vars(error)


def test_a_copy_has_other_fields_and_other_words():
    error = Unreachable(option="truncation.k", got=0, need="more")
    other = error.replace(option="record.k")
    assert str(other) == "record.k=0: need more." and other.args == (str(other),) and type(other) is Unreachable
    assert str(error) == "truncation.k=0: need more."


def test_values_are_shown_as_they_are_typed():
    values = (None, True, False, 2.5, "a b", [1, None, "x"], (0.5, 1.0))
    assert [typed(value) for value in values] == ["null", "true", "false", "2.5", "a b", "[1,null,x]", "[0.5,1.0]"]


def test_a_value_that_is_null_is_shown():
    with refused(option="loss.beta", got=None, need="a number"):
        check("loss.beta", None, False, "a number")
    check("loss.beta", None, True, "a number")


def test_a_folder_that_cannot_be_written_says_what_to_choose():
    error = for_people(PermissionError(13, "Permission denied", "/x"))
    assert "/x" in error.why and "root=/other/folder" in error.hint
    with pytest.raises(ZeroDivisionError):
        for_people(ZeroDivisionError())


def test_exit_with_a_text_is_exit_code_1():
    assert classify(SystemExit("no room")).exit_code == 1
    assert classify(SystemExit(3)).exit_code == 3

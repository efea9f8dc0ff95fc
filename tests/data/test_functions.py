"""Functions of source files as examples: signature and docstring are the prompt."""

import inspect
import sysconfig
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from kd.data import corpora, instructions, packing, templates
from kd.data.examples import Example
from kd.data.instructions import functions
from kd.data.split import TrainValSplit
from kd.data.templates import encode
from kd.data.tokenizer import tokenize
from tests.data.examples import Short, short
from tests.data.examples import cache as cache

SOURCE = '''\
"""A module."""

@decorated(
    "twice")
def outer(a,
          b=1):
    """Add what is ä€ given."""
    def inner():
        """This is a part of another."""
        return a + b
    return inner()  # here


class Thing:
    """A class of its own."""

    async def method(self):
        """Wait for nothing at all.

        Twice.
        """

        await self.other
\x0c
    def short(self): "One line for all."; return 1

    def nothing(self):
        """Does nothing at all."""
        pass

    def refuses(self):
        """Does nothing at all."""
        raise NotImplementedError

    def bare(self):
        """Returns nothing at all."""
        ...
        return None

    def untold(self):
        return 3

    def undescribed(self):
        """Too short."""
        return 3

    class Inner:
        def deep(self):
            """In a class of a class."""
            return {
                1: 2}
'''


def test_functions_are_cut_from_the_source_as_it_stands():
    examples = functions([SOURCE])
    names = [e.turns[0].content.split("def ")[1].split("(")[0] for e in examples]
    assert names == ["outer", "method", "short", "deep"]
    for example in examples:
        ((role, prompt), *_), response, talk = *short(example)[:2], example.conversation
        assert role == "user" and prompt + response in SOURCE and not talk
    prompt, response = (turn.content for turn in examples[0].turns)
    assert prompt == '@decorated(\n    "twice")\ndef outer(a,\n          b=1):\n    """Add what is ä€ given."""'
    assert response == SOURCE[SOURCE.index("\n    def inner") : SOURCE.index("\n\n\nclass")]
    assert (
        examples[1].turns[0].content.startswith("    async def method")
        and examples[1].turns[1].content == "\n\n        await self.other"
    )
    assert short(examples[2]) == Short((("user", '    def short(self): "One line for all."'),), "; return 1")
    assert examples[3].turns[1].content.endswith("                1: 2}")


def test_functions_are_there_once_and_files_that_are_no_python_are_left_out():
    assert functions([SOURCE, "def broken(:", SOURCE, "x = '\0'"]) == functions([SOURCE])
    long = 'def f():\n    """What is long is left out."""\n' + "    x = 1\n" * 101
    assert functions([long]) == [] != functions([long[:500]])


@pytest.fixture(scope="module")
def library() -> list[Example]:
    """Return the functions of every tenth file and of sysconfig, as those of all files would take too long."""
    files = corpora.standard_library()
    return functions([*files[::10], inspect.getsource(sysconfig)])


def test_functions_of_the_standard_library(library):
    assert len(library) > 300 and len({e.turns for e in map(short, library)}) == len(library)
    path = inspect.getsource(sysconfig.get_path)
    assert any(templates.written(e, "plain") == path.rstrip("\n") for e in library)


def test_prompt_and_response_have_the_tokens_of_the_text_that_they_are(library, tmp_path):
    """Compare with the tokens of plain text: no byte-level tokenizer joins the two parts around a docstring's end."""
    packed = packing.pack(
        replace(instructions.instructions(256), load=lambda: library), tmp_path, vocab=2000, val_rows=9
    )
    fast = AutoTokenizer.from_pretrained(packed.tokenizer)
    sample = library[::3]
    for example, ((prompt, response, *_),) in zip(sample, encode(sample, "plain", fast), strict=True):
        assert prompt + response == tokenize([templates.written(example, "plain")], fast)[0]
        assert response == tokenize([example.turns[-1].content], fast)[0]
    assert fast.decode(packed.train[0][: packed.train_spans[0, 0]]) in {e.turns[0].content for e in library}


def test_functions_are_on_the_side_of_their_file():
    """Check that pre-training on the plain text reads no validation rows."""
    side = TrainValSplit(0.5)
    sources = [SOURCE.replace("twice", f"{i} times") for i in range(20)]
    sides = {source: side(source) for source in sources}
    assert set(sides.values()) == {"train", "val"}
    assert {e.document: side(e) for e in functions(sources)}.items() <= sides.items()


def test_functions_are_told_apart_by_content(monkeypatch, tmp_path):
    before = instructions.instructions(64)
    assert before.fingerprint == instructions.instructions(64).fingerprint and before.pairs.template == "plain"
    assert instructions.instructions(64, template="alpaca").pairs.template == "alpaca"
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "a.py").write_text(SOURCE)
    after = instructions.instructions(64)
    assert after.fingerprint != before.fingerprint and after.load() == functions([SOURCE])

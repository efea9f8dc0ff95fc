"""Columns and keys of examples: each is used, refused or counted, whatever its name."""

import inspect
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kd.data import columns, corpora, instructions, packing
from kd.data.batches import IGNORE
from kd.rollout.teacher_text import by_teacher as by_teacher_of
from tests.data.examples import FOUR, ONE, SYSTEM, THREE, TWO, Short, first, load, roles, short, write
from tests.data.examples import cache as cache
from tests.refusals import refused


def test_system_and_history_are_turns(tmp_path):
    row = {"instruction": "And?", "input": "x", "output": "C", "system": "Be brief.", "history": [["A?", "B"]]}
    example = first(tmp_path, row)
    want = [("system", "Be brief."), ("user", "A?"), ("assistant", "B"), ("user", "And?"), ("input", "x")]
    assert short(example) == Short(tuple(want), "C") and example.unlearned == {"earlier": 1} and not example.unused
    assert [turn.learned for turn in first(tmp_path, row, turns="all").turns] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    other = {"system_prompt": "Be brief.", "question": "Q", "response": "R", "history": [ONE, TWO]}
    example = first(tmp_path, other, prompt="question", response="response")
    assert roles(example)[:3] == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    assert first(tmp_path, row | {"system": "", "history": []}).turns[0].role == "user"
    for history in ([["A?", "B"]], [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]):
        assert short(first(tmp_path, row | {"history": json.dumps(history)})) == Short(tuple(want), "C")


def test_a_system_prompt_beside_messages_is_there_once(tmp_path):
    example = first(tmp_path, {"messages": [ONE, TWO], "system": "Be brief."})
    assert roles(example) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    assert roles(first(tmp_path, {"messages": [SYSTEM, ONE, TWO], "system": "Be brief."})) == roles(example)
    with refused(
        option="data.files", why="in line 1, the columns or messages hold two system prompts, 'Be brief.' and 'No.'"
    ):
        first(tmp_path, {"messages": [SYSTEM, ONE, TWO], "system": "No."})


@pytest.mark.parametrize(
    "prompt", ["Hi", " Hi\n", [ONE], [SYSTEM, ONE]], ids=["text", "text with space", "messages", "with system"]
)
def test_a_whole_conversation_beside_its_prompt_is_read_once(tmp_path, prompt):
    row = {"prompt": prompt, "chosen": [ONE, TWO], "rejected": [ONE, FOUR], "score": 8.0}
    example = first(tmp_path, row, prompt="prompt", response="chosen")
    system = [("system", "Be brief.")] if prompt == [SYSTEM, ONE] else []
    assert roles(example) == [*system, ("user", "Hi"), ("assistant", "Hello")]
    assert example.unused == ("column rejected", "column score") and example.conversation


def test_a_whole_conversation_beside_its_prompt_may_be_json(tmp_path):
    for prompt in ("Hi", [ONE]):
        for turns in ([ONE, TWO], [SYSTEM, ONE, TWO], [ONE, TWO, THREE, FOUR]):
            row = {"prompt": prompt, "chosen": json.dumps(turns)}
            example = first(tmp_path, row, prompt="prompt", response="chosen")
            assert roles(example) == [(turn["role"], turn["content"]) for turn in turns] and example.conversation


def test_two_system_prompts_are_refused_and_equal_ones_are_there_once(tmp_path):
    other = SYSTEM | {"content": "No."}
    row = {"instruction": "I", "output": "O", "system": "Be brief."}
    history = {"history": [SYSTEM, ONE, TWO]}
    assert roles(first(tmp_path, row | {"system_prompt": "Be brief."}))[:2] == [("system", "Be brief."), ("user", "I")]
    assert [role for role, _ in roles(first(tmp_path, row | history))] == ["system", *["user", "assistant"] * 2]
    chosen = {"prompt": [SYSTEM, ONE], "chosen": [SYSTEM, ONE, TWO]}
    named = {"prompt": "prompt", "response": "chosen"}
    assert len(first(tmp_path, chosen, **named).turns) == 3
    for bad, settings in ((row | {"system_prompt": "No."}, {}), (row | history | {"system": "No."}, {}),
                          (chosen | {"prompt": [other, ONE]}, named)):  # fmt: skip
        with refused(option="data.files", why="two system prompts"):
            first(tmp_path, bad, **settings)


@pytest.mark.parametrize(
    ("prompt", "name", "response"),
    [("instruction", "input", "response"), ("instruction", "context", "output"), ("question", "context", "answer"),
     ("prompt", "input", "response"), ("prompt", "context", "completion"), ("question", "input", "answer")],
)  # fmt: skip
@pytest.mark.parametrize("named", [False, True])
def test_an_input_is_used_beside_every_prompt(tmp_path, prompt, name, response, named):
    columns = {"prompt": prompt, "response": response} if named else {}
    example = first(tmp_path, {prompt: "P", name: "X", response: "R"}, **columns)
    assert short(example) == Short((("user", "P"), ("input", "X")), "R") and not example.unused


def test_several_turns_beside_a_prompt(tmp_path):
    row = {"prompt": "Hi", "chosen": [SYSTEM, ONE, TWO, THREE, FOUR]}
    assert len(first(tmp_path, row, prompt="prompt", response="chosen").turns) == 5
    with refused(why=("'chosen' holds turns of the user", "with column 'prompt'"), hint="type data.prompt=chosen"):
        first(tmp_path, row | {"prompt": "Other"}, prompt="prompt", response="chosen")


def test_an_input_is_used_where_its_instruction_is_named(tmp_path):
    row = {"instruction": "I", "input": "X", "output": "O", "better": "B"}
    example = first(tmp_path, row, prompt="instruction", response="better")
    assert short(example) == Short((("user", "I"), ("input", "X")), "B") and example.unused == ("column output",)


def test_weights_and_labels_of_rows(tmp_path):
    row = {"prompt": "P", "completion": "C"}
    for name, bad, good, reason in (("weight", 0, 1, "weight"), ("label", False, True, "label")):
        assert first(tmp_path, row | {name: bad}).left_out == reason
        assert short(first(tmp_path, row | {name: good})) == Short((("user", "P"),), "C")
    with refused(option="data.files", why="column 'weight' holds 0.5, and a row is learned as a whole", need="0 or 1"):
        first(tmp_path, row | {"weight": 0.5})
    assert first(tmp_path, row | {"label": "sports"}).unused == ("column label",)
    for no in (
        {"loss_weight": 0},
        {"sample_weight": 0.0},
        {"mask": 1},
        {"train": False},
        {"loss_mask": 0},
        {"training": False},
    ):
        ((name, value),) = no.items()
        assert first(tmp_path, row | no).left_out == "weight"
        example = first(tmp_path, row | {name: not value})
        assert example.turns[1].learned and not example.unused
        for bad in ("0", 0.5, [0, 1]):
            with refused(option="data.files", why=f"column '{name}' holds", need="0 or 1"):
                first(tmp_path, row | {name: bad})
    assert short(first(tmp_path, {"prompt": "P", "weight": "W"}, prompt="prompt", response="weight")).response == "W"


@pytest.mark.parametrize(
    ("column", "value"),
    [("system", 3), ("history", "text"), ("history", [["a"]]), ("tools", "no json"), ("tools", [3]),
     ("chat_template_kwargs", "x")],
)  # fmt: skip
def test_a_column_of_an_example_that_cannot_be_read_is_refused_by_name(tmp_path, column, value):
    with refused(option="data.files", why=f"column '{column}' holds"):
        first(tmp_path, {"prompt": "P", "response": "R", column: value})


@pytest.mark.parametrize("name", sorted(columns.RENDERING))
def test_options_that_are_set_elsewhere_are_refused_by_name(tmp_path, name):
    row = {"prompt": "P", "response": "R", "chat_template_kwargs": {name: True, "enable_thinking": False}}
    with refused(why=f"column 'chat_template_kwargs' sets {name}, which kd sets itself", hint=f"leave {name} out"):
        first(tmp_path, row)
    row["chat_template_kwargs"][name] = None
    assert first(tmp_path, row).options == {"enable_thinking": False}


def test_all_parameters_of_rendering_are_known():
    call = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(call) - {"self", "documents", "kwargs"} <= columns.RENDERING


def test_columns_that_nothing_reads_are_named(tmp_path):
    row = {"instruction": "I", "output": "O", "category": "x", "text": "all", "empty": None, "none": ""}
    assert first(tmp_path, row).unused == ("column category", "column text")


def test_prompts_alone(tmp_path):
    for prompt in ("Hi", [ONE], [ONE, TWO, THREE]):
        example = first(tmp_path, {"prompt": prompt, "id": 3})
        assert example.prompt_only and example.turns[-1][:2] == ("assistant", "") and example.turns[0].content == "Hi"
        assert example.unused == ("column id",)
    assert not first(tmp_path, {"prompt": [ONE, TWO]}).prompt_only


@pytest.mark.parametrize("response", ["R", [TWO], [ONE, TWO]], ids=["text", "messages", "conversation"])
@pytest.mark.parametrize("name", ["answer", "output", "solution", "chosen"])
def test_prompts_beside_what_may_be_a_response_are_refused(tmp_path, name, response):
    for prompt in ("Hi", [ONE]):
        row = {"id": 3, "prompt": prompt, name: response, "system": "S"}
        hint = f"type data.prompt=prompt data.response={name} to"
        with refused(option="data.files", why=f"{name} may hold the response", hint=hint):
            first(tmp_path, row)
        assert not first(tmp_path, row, prompt="prompt", response=name).prompt_only
        assert first(tmp_path, row, prompt="prompt").prompt_only
    assert not first(tmp_path, {"prompt": [ONE, TWO], name: response}).prompt_only
    assert first(tmp_path, {"prompt": "Hi", name: None, "system": "S"}).prompt_only
    with refused(why="answer, other may hold", hint="type data.prompt=prompt data.response=ONE_OF"):
        first(tmp_path, {"prompt": "Hi", "answer": "A", "other": "B"})


def test_the_teacher_writes_only_references_that_are_missing(tmp_path):
    rows = [{"prompt": [ONE | {"content": f"q{i}"}, *([TWO] if i % 2 else [])]} for i in range(60)]
    corpus = instructions.instructions(12, files=str(write(tmp_path / "a.jsonl", *rows)), template="plain")
    packed = packing.pack(corpus, tmp_path / "packed", seq_len=12, vocab=257, val_share=0.5)
    missing = np.diff(packed.val_spans)[:, 0] == 1
    assert 0 < missing.sum() < len(missing)
    written = []

    def write_x(batch, *_):
        written.extend(batch.row_ids.tolist())
        teacher.tokens, teacher.seconds = teacher.tokens + 2, teacher.seconds + 1
        labels = torch.full_like(batch.labels, IGNORE)
        return batch._replace(labels=labels.index_fill(1, torch.tensor([5, 6]), 7))

    model = SimpleNamespace(device="cpu")
    teacher = SimpleNamespace(seed=0, tokens=0, seconds=0, teacher=SimpleNamespace(model=model))

    def by_teacher(packed_data, name):
        return by_teacher_of(packed_data, tmp_path / name, lambda _: write_x, lambda: teacher, ("val",))

    completed = by_teacher(packed, "written")
    assert written == np.flatnonzero(missing).tolist() and (completed.train == packed.train).all()
    assert (completed.val[~missing] == packed.val[~missing]).all()
    assert (completed.val_spans[~missing] == packed.val_spans[~missing]).all()
    assert (np.diff(completed.val_spans[missing])[:, 0] == 2).all()
    assert (by_teacher(completed, "again").val == completed.val).all()  # where none is missing


def test_columns_may_differ_between_files_and_rows(tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": "P", "response": "R", "n": 1}, {"prompt": "Q", "response": "S", "n": "x"})
    write(tmp_path / "b.jsonl", {"instruction": "I", "output": "O"})
    write(tmp_path / "c.jsonl", {"messages": [ONE, TWO]})
    examples = load(tmp_path / "*.jsonl")
    assert [e.turns[0].content for e in examples] == ["P", "Q", "I", "Hi"]
    write(tmp_path / "a.parquet", {"prompt": "P", "response": "R", "n": 1})
    write(tmp_path / "b.parquet", {"prompt": "I", "response": "O", "n": "x", "m": 1.5})
    assert [e.turns[0].content for e in load(tmp_path / "*.parquet")] == ["P", "I"]


@pytest.mark.parametrize("text", ["2020-01-31", "2020-01-31T10:00:00", "2020-01-31 10:00:00", "10:00"])
def test_text_of_dates_alone_is_text(tmp_path, text):
    rows = [{"question": "When?", "answer": text}] * 3
    assert {e.turns[1].content for e in load(write(tmp_path / "a.jsonl", *rows))} == {text}
    rows = [{"messages": [ONE, TWO | {"content": text}]}] * 3
    assert {e.turns[1].content for e in load(write(tmp_path / "b.jsonl", *rows))} == {text}
    assert load(write(tmp_path / "c.json", *rows))[0].turns[1].content == text


def test_what_a_folder_cannot_hold_is_said_with_what_can_be_typed(tmp_path):
    folder = write(tmp_path / "set" / "a.jsonl", *[{"question": "When?", "answer": "2020-01-31"}] * 3).parent
    with refused(option="data.name", got=folder, why="holds datetime (a .jsonl file that is named by data.files="):
        list(instructions.instructions(64, name=str(folder)).load())
    write(folder / "b.jsonl", {"question": {"a": 1}, "other": [3]})
    with refused(option="data.name", got=folder, hint=f"data.files='{folder}/*.jsonl'"):
        list(instructions.instructions(64, name=str(folder)).load())


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", ["a[1]", "a[x-z]*", "[1]/a", "what?"])
def test_names_with_signs_of_patterns(tmp_path, name, kind):
    path = tmp_path / f"{name}.{kind}"
    path.parent.mkdir(exist_ok=True)
    write(path, {"prompt": "P", "response": "R"})
    assert short(load(path)[0]) == Short((("user", "P"),), "R")
    if name == "[1]/a":
        assert len(load(path.parent / "*")) == 1


@pytest.mark.parametrize("parts", [False, True])
def test_a_folder_of_save_to_disk_is_read(tmp_path, parts):
    rows = datasets.Dataset.from_list([{"prompt": "P", "response": "R", "text": "T"}])
    (datasets.DatasetDict({"train": rows, "other": rows}) if parts else rows).save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    assert short(instructions.instructions(64, name=name).load()[0]) == Short((("user", "P"),), "R")
    for streaming in (True, False):
        assert list(corpora.hub(name, streaming=streaming).load()) == ["T"]
    if parts:
        assert len(instructions.instructions(64, name=name, split="other").load()) == 1
    for wrong in ({"split": "nope"}, {"subset": "x"}, {"revision": "x"}):
        with refused(option="data.name", got=name) as caught:
            instructions.instructions(64, name=name, **wrong).load()
        message = str(caught.value)
        assert f"data.{next(iter(wrong))}" in message and "data.files" not in message
    with refused(option="data.files", got=name, why="is a folder of save_to_disk", hint=f"type data.name={name}"):
        instructions.instructions(64, files=name).load()


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"prompt": "P"}\n{"prom', "line 2"), ('{"prompt": "P"}\n[1]', "line 2: list, and each row must be an object"),
     ("[1]", "row 1: int"), ('{"prompt": "\\ud800", "response": "x"}', "surrogates")],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, text, why):
    (tmp_path / "a.jsonl").write_text(text)
    with refused(option="data.files", got=tmp_path / "a.jsonl", why=("could not be read as json: ", why)):
        load(tmp_path / "a.jsonl")

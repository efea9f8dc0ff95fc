"""Messages of examples: roles, turns that are learned, tools and calls, whatever their keys."""

import json

import pytest

from tests.data.examples import CALL, FOUR, ONE, SYSTEM, THREE, TOOL, TWO, Short, first, load, roles, short, write
from tests.data.examples import cache as cache
from tests.refusals import refused


def test_weight_decides_which_turn_is_learned(tmp_path):
    turns = [ONE, TWO | {"weight": 1}, THREE, FOUR | {"weight": 0}]
    for learn in ("last", "all"):
        example = first(tmp_path, {"messages": turns}, turns=learn)
        assert roles(example) == [("user", "Hi"), ("assistant", "Hello")] and example.turns[1].learned
        assert example.unlearned == {"weight": 1} and example.unused == ("turns after the last that is learned",)
    assert first(tmp_path, {"messages": [ONE, TWO | {"weight": 0}]}).left_out == "weight"


@pytest.mark.parametrize(
    "no", [{"weight": 0}, {"weight": False}, {"train": False}, {"trainable": 0}, {"loss": False}, {"masked": True},
           {"mask": 1}, {"loss_weight": 0.0}, {"training": False}, {"loss_mask": 0}, {"train_on_turn": False}],
)  # fmt: skip
def test_other_keys_that_say_so(tmp_path, no):
    ((key, value),) = no.items()
    assert first(tmp_path, {"messages": [ONE, TWO | no, THREE, FOUR]}, turns="all").unlearned == {"weight": 1}
    assert first(tmp_path, {"messages": [ONE, TWO | {key: not value}]}).turns[1].learned
    with refused(option="data.files", why=f"{key}=0.5 in a message", need="0 or 1"):
        first(tmp_path, {"messages": [ONE, TWO | {key: 0.5}]})


def test_a_weight_of_others_turns_is_counted(tmp_path):
    example = first(tmp_path, {"messages": [ONE | {"weight": 1}, TWO]})
    assert example.unused == ("weight of turns that are not the assistant's",)
    assert not first(tmp_path, {"messages": [ONE | {"weight": 0}, TWO]}).unused


@pytest.mark.parametrize("learn", ["last", "all"])
def test_turns_that_are_learned(tmp_path, learn):
    example = first(tmp_path, {"messages": [ONE, TWO, THREE, FOUR, ONE]}, turns=learn)
    assert [turn.learned for turn in example.turns] == [False, learn == "all", False, True]
    assert example.unlearned == ({} if learn == "all" else {"earlier": 1})
    assert [len(before) for before, _ in example.rows()] == ([1, 3] if learn == "all" else [3])
    assert example.split_text == ("Hi" if learn == "all" else "Hi Hello And?")


@pytest.mark.parametrize("learn", ["last", "all"])
def test_a_greeting_before_the_first_prompt_is_context(tmp_path, learn):
    greeting = {"role": "assistant", "content": "Welcome"}
    for before in ([greeting], [SYSTEM, greeting], [greeting, greeting]):
        example = first(tmp_path, {"messages": [*before, ONE, TWO]}, turns=learn)
        assert [turn.learned for turn in example.turns] == [False] * (len(before) + 1) + [True]
        assert example.unlearned == {"no_prompt": before.count(greeting)}
        assert example.split_text == " ".join([*(m["content"] for m in before), "Hi"])
    assert first(tmp_path, {"messages": [greeting, ONE]}, turns=learn).left_out == "no_response"
    assert first(tmp_path, {"messages": [greeting, ONE, TWO | {"weight": 0}]}, turns=learn).left_out == "weight"
    assert first(tmp_path, {"messages": [SYSTEM, greeting]}, turns=learn).left_out == "no_prompt"
    example = first(tmp_path, {"prompt": [greeting, ONE]}, turns=learn)
    assert example.prompt_only and roles(example)[0] == ("assistant", "Welcome")
    example = first(tmp_path, {"prompt": "And?", "response": "R", "history": [greeting, ONE, TWO]}, turns=learn)
    assert example.unlearned == {"no_prompt": 1} | ({"earlier": 1} if learn == "last" else {})


def test_empty_turns_are_not_learned(tmp_path):
    empty = FOUR | {"content": " \n"}
    assert first(tmp_path, {"messages": [ONE, TWO, THREE, empty]}).left_out == "no_response"
    example = first(tmp_path, {"messages": [ONE, TWO, THREE, empty]}, turns="all")
    assert example.unlearned == {"empty": 1} and [turn.learned for turn in example.turns] == [False, True]
    assert first(tmp_path, {"instruction": "I", "output": " "}).left_out == "no_response"
    assert first(tmp_path, {"instruction": " ", "output": "O"}).left_out == "no_prompt"


@pytest.mark.parametrize("role", ["gpt", "model", "bot", "Assistant", "ai", "chatbot"])
def test_roles_of_other_names(tmp_path, role):
    example = first(tmp_path, {"messages": [{"role": "human", "content": "Hi"}, {"role": role, "content": "Hello"}]})
    assert roles(example) == [("user", "Hi"), ("assistant", "Hello")]
    example = first(tmp_path, {"conversations": [{"from": "human", "value": "Hi"}, {"from": role, "value": "Hello"}]})
    assert roles(example) == [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize("role", ["narrator", "g"])
def test_other_roles_are_refused_by_name(tmp_path, role):
    for messages in ([ONE, {"role": role, "content": "x"}, TWO], [ONE, TWO | {"role": role}]):
        with refused(why=f"'messages' has a message of the role '{role}'", need="one of the roles human, gpt"):
            first(tmp_path, {"messages": messages})


LISTS = {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "value", [LISTS, json.dumps([ONE, TWO]), json.dumps(LISTS)], ids=["lists", "JSON", "JSON lists"]
)
def test_messages_in_other_forms(tmp_path, value, kind):
    assert roles(first(tmp_path, {"messages": value}, kind=kind)) == [("user", "Hi"), ("assistant", "Hello")]
    example = first(tmp_path, {"prompt": json.dumps([ONE]), "completion": json.dumps([TWO])}, kind=kind)
    assert roles(example) == [("user", "Hi"), ("assistant", "Hello")]


def test_text_that_is_json_stays_text(tmp_path):
    answer = json.dumps([ONE, TWO])
    example = first(tmp_path, {"instruction": "Count these.", "input": "[]", "output": answer})
    assert short(example) == Short((("user", "Count these."), ("input", "[]")), answer)
    assert short(first(tmp_path, {"prompt": answer, "response": "R"})) == Short((("user", answer),), "R")


def test_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert roles(first(tmp_path, {"messages": [ONE, TWO | {"content": parts}]}))[1] == ("assistant", "Hello")
    with refused(option="data.files", why="column 'messages' holds a list with"):
        first(tmp_path, {"messages": [ONE | {"content": [{"type": "image", "url": "x"}]}, TWO]})


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_and_calls_are_kept(tmp_path, tools):
    messages = [ONE, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    for row in ({"messages": messages, "tools": tools}, {"messages": json.dumps(messages), "tools": tools}):
        example = first(tmp_path, row)
        assert example.tools == (TOOL,) and example.turns[1].learned and example.turns[1].keys == {"tool_calls": [CALL]}


def test_functions_are_tools(tmp_path):
    for given in ({"functions": [TOOL["function"]]}, {"functions": [TOOL]},
                  {"functions": [TOOL["function"]], "tools": [TOOL]}):  # fmt: skip
        example = first(tmp_path, {"messages": [ONE, TWO]} | given)
        assert example.tools == (TOOL,) and not example.unused


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_calls_may_be_json(tmp_path, kind):
    for key, calls, want in (("tool_calls", [CALL], [CALL]), ("tool_calls", CALL, [CALL]),
                             ("function_call", CALL["function"], CALL["function"])):  # fmt: skip
        row = {"messages": [ONE, {"role": "assistant", "content": None, key: json.dumps(calls)}]}
        example = first(tmp_path, row, kind=kind)
        assert example.turns[1].keys == {key: want} and example.turns[1].learned
    with refused(option="data.files", why="'tool_calls' holds 'weather'", need="calls of functions"):
        first(tmp_path, {"messages": [ONE, TWO | {"tool_calls": "weather"}]}, kind=kind)


def test_null_that_a_row_itself_has_is_kept(tmp_path):
    """A table fills in null for what a row does not have; a line of JSON, and JSON text, do not."""
    call = {"function": {"name": "weather", "arguments": {"city": "Paris", "unit": None}}}
    tool = {"type": "function", "function": {"name": "weather", "default": None}}
    messages = [ONE, {"role": "assistant", "content": None, "tool_calls": [call]}]
    as_json = [ONE, messages[1] | {"tool_calls": json.dumps([call])}]
    for kind, row in (("jsonl", {"messages": messages, "tools": [tool]}),
                      ("parquet", {"messages": json.dumps(messages), "tools": json.dumps([tool])}),
                      ("parquet", {"messages": as_json, "tools": [json.dumps(tool)]})):  # fmt: skip
        example = first(tmp_path, row, kind=kind)
        assert example.turns[1].keys == {"tool_calls": [call]} and example.tools == (tool,)


def test_what_tables_fill_in_is_not_there(tmp_path):
    """A Parquet file has the keys of all rows in each row."""
    messages = [ONE, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    rows = [
        {"messages": messages, "tools": [TOOL]},
        {"messages": [ONE, TWO | {"name": "n"}], "tools": [TOOL | {"x": 1}]},
    ]
    example, other = load(write(tmp_path / "a.parquet", *rows))
    assert example.tools == (TOOL,) and example.turns[1].keys == {"tool_calls": [CALL]} and not example.turns[0].keys
    assert other.turns[1].keys == {"name": "n"} and not other.unused

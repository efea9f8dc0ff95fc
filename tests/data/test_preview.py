"""python -m kd.data show: what is prompt, what is learned and what became of all that was read."""

import json
import re
import sys

import pytest
from tokenizers.processors import TemplateProcessing

from kd.data import __main__ as data_main
from kd.data import preview
from kd.data.batches import IGNORE
from tests.data.examples import cache as cache
from tests.data.examples import tokenizer, write
from tests.data.test_templates import THINK
from tests.small import SMALL

MESSAGES = [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "one", "weight": 1, "id": "x"}]


@pytest.fixture
def words(tmp_path) -> list[str]:
    rows = [{"messages": MESSAGES, "tag": "t"}] + [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "x" if n % 3 else ""}]}
        for n in range(2, 60)
    ]
    file = write(tmp_path / "chats.jsonl", *rows)
    tokenizer(chat_template=THINK).save_pretrained(tmp_path / "own")
    return ["data=instructions", f"data.files={file}", f"data.tokenizer={tmp_path / 'own'}", "data.seq_len=120",
            f"root={tmp_path}", "data.val_share=0.3"]  # fmt: skip


def shown(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["kd.data", "show", *words])
    data_main.main()
    return capsys.readouterr().out


def test_rows_counts_and_template_as_json(monkeypatch, capsys, words):
    preview = json.loads(shown(monkeypatch, capsys, "--json", *words, "rows=2"))
    counts = preview["counts"]
    assert len(preview["rows"]) == 2 and preview["template"] == "chat"
    assert counts["read"] == 59 and counts["left_out"] == {"no_response": 19}
    assert counts["unused"] == {"column tag": 1, "key id": 1}
    assert preview["layout"] == {
        "prompt": "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", "inserted": "<think>\n\n</think>\n\n",
        "learned": "{assistant}", "end": "<|im_end|>",
    }  # fmt: skip
    fast = tokenizer()
    for row in preview["rows"]:
        assert len(row["ids"]) == len(row["labels"]) and fast.decode(row["ids"]) == row["text"]
        learned = [label for label in row["labels"] if label != IGNORE]
        assert row["labels"][-len(learned) :] == learned == row["ids"][-len(learned) :]
        assert fast.decode(learned) == row["learned"] in ("x<|im_end|>", "one<|im_end|>")
        assert row["prompt"].endswith("<think>\n\n</think>\n\n") and row["prompt"] + row["learned"] == row["text"]


def test_a_setting_typed_as_a_switch_is_refused_with_what_to_type(monkeypatch, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        shown(monkeypatch, capsys, *words, "--root", "x")
    assert "Type root=x." in capsys.readouterr().err


def test_the_number_of_rows_is_offered_by_its_name(monkeypatch, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        shown(monkeypatch, capsys, *words, "rows", "5")
    assert "Type rows=5." in capsys.readouterr().err


def test_a_secret_typed_as_a_switch_is_not_shown(monkeypatch, capsys, words):
    secret = "hf_" + 30 * "a"
    with pytest.raises(SystemExit, match="2"):
        shown(monkeypatch, capsys, *words, f"--logger.token={secret}")
    message = capsys.readouterr().err
    assert "there seems to be a secret" in message and secret not in message


def test_people_see_the_same(monkeypatch, capsys, words):
    text = shown(monkeypatch, capsys, *words)
    assert text.count("row ") == 3 and text.count("learned, 2 tokens") >= 2
    assert "template chat" in text and "inserted '<think>" in text and "19 without a response" in text
    monkeypatch.setattr(preview, "Terminal", lambda **options: preview_terminal(**options))
    text = shown(monkeypatch, capsys, *words, "rows=1")
    assert "\x1b[36m" in text and "\x1b[32m" in text and "\x1b[7;32m<|im_end|>" in text


def preview_terminal(**options):
    from kd.system.console import Terminal

    return Terminal(force_terminal=True, color_system="standard", **options)


def test_plain_text_is_learned_as_a_whole(monkeypatch, capsys, tmp_path):
    given = [word for word in SMALL if word.startswith("data")]
    preview = json.loads(shown(monkeypatch, capsys, *given, f"root={tmp_path}", "--json"))
    assert preview["layout"] == {} and preview["counts"]["unit"] == "documents"
    for row in preview["rows"]:  # a label is the token after, so the first of a row has none
        assert row["labels"] == [IGNORE, *row["ids"][1:]] and not row["prompt"]


def test_labels_of_plain_text_are_those_of_training(monkeypatch, capsys, tmp_path):
    fast = tokenizer(bos_token="<|im_start|>", chat_template=None)
    start, end = fast.bos_token_id, fast.eos_token_id
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    fast.save_pretrained(tmp_path / "own")
    file = write(tmp_path / "a.jsonl", *({"text": f"ab{n}"} for n in range(90)))
    words = ["data=text", f"data.files={file}", f"data.tokenizer={tmp_path / 'own'}", "data.seq_len=12",
             f"root={tmp_path}", "data.val_share=0.3"]  # fmt: skip
    preview = json.loads(shown(monkeypatch, capsys, *words, "--json"))
    for row in preview["rows"]:
        ids = row["ids"]
        assert start in ids[1:] and row["labels"] == [
            IGNORE if place == 0 or (token == start and ids[place - 1] == end) else token
            for place, token in enumerate(ids)
        ]
        assert "<|im_start|>" in row["text"] and "<|im_start|>" not in row["learned"]
    labels = preview["rows"][0]["labels"]
    assert f"learned, {sum(label != IGNORE for label in labels)} tokens" in shown(monkeypatch, capsys, *words)


def test_nothing_is_learned_of_prompts_alone(monkeypatch, capsys, tmp_path):
    tokenizer().save_pretrained(tmp_path / "own")
    file = write(tmp_path / "a.jsonl", *({"prompt": f"Say {n}"} for n in range(10, 70)))
    words = ["data=instructions", f"data.files={file}", f"data.tokenizer={tmp_path / 'own'}", "data.seq_len=250",
             f"root={tmp_path}", "data.val_share=0.3", "data.prompt_len=240", "data.template=plain"]  # fmt: skip
    preview = json.loads(shown(monkeypatch, capsys, *words, "--json"))
    for row in preview["rows"]:
        assert {*row["labels"]} == {IGNORE} and row["text"] == row["prompt"] and row["learned"] == ""
    text = shown(monkeypatch, capsys, *words)
    assert "prompt, 6 tokens" in text and "learned, " not in text


def test_counts_are_printed_once_and_are_rows(monkeypatch, capsys, tmp_path):
    ask, say = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [ask | {"content": f"q{n}"}, say, ask, say]} for n in range(60)]
    file = write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "plain.txt").write_text("\n\n".join(f"{n} + {n} = {2 * n}" for n in range(4000)))
    words = ["data=instructions", f"data.files={file}", "data.vocab=257", "data.seq_len=250", f"root={tmp_path}",
             "plain=text", f"plain.files={tmp_path / 'plain.txt'}",
             "data.val_share=0.3", "data.prompt_len=240", "data.turns=all", "data.template=plain"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["kd.data", "show", *words])
    data_main.main()
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("60 examples read") == 1
    train, val = map(int, re.search(r"60 examples read, (\d+) rows for training and (\d+)", printed.out).groups())
    assert train + val == 120


@pytest.mark.parametrize("word", ["rows=x", "data.files=none.jsonl", "nope=1"])
def test_mistakes_are_one_line(monkeypatch, capsys, words, word):
    with pytest.raises(SystemExit) as error:
        shown(monkeypatch, capsys, *words, word)
    assert error.value.code == 2 and word.partition("=")[0] in capsys.readouterr().err


def test_what_a_file_holds_does_not_steer_the_terminal(monkeypatch, capsys, tmp_path):
    rows = [{"prompt": f"{n}\x1b[2J", "response": "[/b]\x07y"} for n in range(40)]
    file = write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "plain.txt").write_text("\n\n".join(f"{n} + {n} = {2 * n}" for n in range(2000)))
    text = shown(monkeypatch, capsys, "data=instructions", f"data.files={file}", f"root={tmp_path}", "data.seq_len=64",
                 "data.template=plain", "data.val_share=0.3", "data.vocab=300", "plain=text",
                 f"plain.files={tmp_path / 'plain.txt'}")  # fmt: skip
    assert "\x1b[2J" not in text and "\x07" not in text and "[/b]" in text

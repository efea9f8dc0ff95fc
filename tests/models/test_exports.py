"""Students of unusual models are trained, and exported with their end token."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kd.data import packing
from kd.experiment.dependencies import Plan
from tests.models.examples import GATED, MIXTURES, NO_ATTENTION, text_and_tokenizer
from tests.refusals import refused
from tests.small import here, small_config

pytestmark = pytest.mark.usefixtures("connections")


def test_ids_with_holes_are_trained(tmp_path):
    text, name = text_and_tokenizer(tmp_path, {"w39": 500, "far": 777})
    words = f"data=text data.files={text} data.seq_len=32 data.val_rows=4 data.tokenizer={name} data.field=text"
    folder = here(tmp_path / "runs", *words.split(), "logits=none", "teacher=none", "trainer.steps=2")
    assert json.loads((folder / "student" / "config.json").read_text())["vocab_size"] == 778


def test_a_student_without_attention_learns_from_a_mixture_with_a_bos(tmp_path):
    text, name = text_and_tokenizer(tmp_path, {"<s>": 42})
    fast = PreTrainedTokenizerFast.from_pretrained(name, bos_token="<s>")
    fast.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 42)])
    for role, config in (("student", NO_ATTENTION["mamba"]), ("teacher", MIXTURES["mixtral"])):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / role)
        fast.save_pretrained(tmp_path / role)
    words = f"data=text data.files={text} data.seq_len=32 data.val_rows=4 trainer.steps=2 optim=adamw"
    words += f" student=hub student.name={tmp_path / 'student'} teacher=hub teacher.name={tmp_path / 'teacher'}"
    folder = here(tmp_path / "runs", *words.split())
    result = json.loads((folder / "result.json").read_text())
    assert result["active_parameters"] == result["parameters"]
    assert result["teacher_active_parameters"] < result["teacher_parameters"]
    (data,) = (packing.open_packed(path) for path in (tmp_path / "runs" / "data").iterdir() if path.is_dir())
    assert (data.val[:, 0] == 42).all() and (data.val[:, 1:] == 42).any() and data.boundary == (1, 42)
    # The loss of plain transformers, on all labels but those in front of a text.
    rows, student = torch.from_numpy(data.val.astype(int)), folder / "student"
    model = transformers.AutoModelForCausalLM.from_pretrained(student).eval()
    labels = rows[:, 1:].masked_fill(rows[:, 1:] == 42, -100)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits[..., :43].flatten(0, 1), labels.flatten())
    assert result["final"]["val/lm"] == pytest.approx(loss.item(), rel=1e-4)
    bpb = loss.item() / math.log(2) / result["bytes_per_token"]
    assert result["final"]["val/bpb"] == pytest.approx(bpb, rel=1e-4)
    # A store of it holds the positions that count.
    offline = here(tmp_path / "runs", *words.split(), "logits=offline", "truncation=top_k", "truncation.k=5")
    assert json.loads((offline / "result.json").read_text())["final"]["val/lm"] > 0


# The end in what is exported

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ends(folder: Path) -> tuple:
    """Return the end tokens that config.json and generation_config.json name, and that plain transformers loads."""
    files = [json.loads((folder / "student" / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    values = [*(file.get("eos_token_id") for file in files), loaded.generation_config.eos_token_id]
    assert values[0] == values[1] == values[2]
    return values[0]


@pytest.mark.parametrize(("data", "expected"), [("chat", 43), ("plain", [43, 1]), ("alpaca", 1), ("text", 1)])
def test_exported_student_ends_as_rows_did_in_training(tmp_path, data, expected):
    """A base model whose config names another end than its rows have."""
    text, name = text_and_tokenizer(tmp_path, {"<user>": 42, "<turn>": 43, "<assistant>": 44})
    fast = PreTrainedTokenizerFast.from_pretrained(name, chat_template=CHAT)
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<turn>", "<assistant>"]})
    fast.save_pretrained(tmp_path / "base")
    config = transformers.LlamaConfig(**GATED | {"vocab_size": 45}, eos_token_id=7, bos_token_id=3)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"w{n % 40} w{n // 40}", "response": f"w{n % 7}"} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = tmp_path / "base"
    words = f"data.tokenizer={base} data.seq_len=64 data.val_rows=2 trainer.steps=1 optim=adamw "
    if data == "text":  # of a size, whose fresh config names 0
        words += f"data=text data.files={text} student=100k"
    else:
        words += f"data=instructions data.files={tmp_path / 'a.jsonl'} student=hub student.name={base}"
        words += " data.template=alpaca data.prompt_len=50" if data == "alpaca" else " data.template=chat"
    if data == "plain":
        words += f" lm=plain plain=text plain.files={text} alpha.peak=0.5 teacher=hub teacher.name={base}"
    else:
        words += " logits=none teacher=none"
    folder = here(tmp_path / "runs", *words.split())
    assert ends(folder) == expected


def test_rows_without_an_end_name_none(tmp_path):
    assert ends(here(tmp_path, "logits=none", "teacher=none", "trainer.steps=1")) is None


def test_token_names_are_compared_as_typed(tmp_path):
    """A student whose special token has another name than the data's; the run has the same name either way."""
    text, name = text_and_tokenizer(tmp_path)
    shutil.copytree(name, tmp_path / "own")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "own" / file
        path.write_text(path.read_text().replace("</s>", "<end>"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GATED | {"vocab_size": 42})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "own")
    words = (
        f"data=text data.files={text} data.seq_len=32 data.val_rows=2 data.tokenizer={name} logits=none teacher=none"
    )
    words += f" student=hub student.name={tmp_path / 'own'} optim=adamw trainer.steps=1"
    with refused(why="id 1 is '</s>' in the data's and '<end>' in its", hint="token_names=any"):
        here(tmp_path / "runs", *words.split())
    folder = here(tmp_path / "runs", *words.split(), "token_names=any")
    assert (folder / "result.json").exists()
    assert Plan.from_config(small_config(tmp_path / "runs", *words.split())).run.folder == folder

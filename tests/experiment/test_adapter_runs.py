"""Runs with an adapter resume exactly from a checkpoint without the frozen weights, and end in a plain student."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd.config.compose import config_of
from kd.experiment import planner, step_timing
from kd.experiment.dependencies import Plan
from kd.models import causal_lm
from kd.runs import identity
from kd.system import files
from kd.system.signals import Preempted, requests
from kd.training.module import DistillationModule
from tests.refusals import refused
from tests.small import TRAIN, folder, here, outcome, python, result, small_config

WORDS = [f"w{n}" for n in range(40)]
STEPS = 4
IDS = torch.arange(32)[None] % 40


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with text, instructions, and two models with one tokenizer: base and teacher."""
    place = tmp_path_factory.mktemp("adapters")
    lines = (" ".join(random.Random(n).choices(WORDS, k=40)) for n in range(60))
    (place / "text.txt").write_text("\n\n".join(lines))
    rows = [{"prompt": f"w{a} w{b}", "response": f"w{b} w{a} w1"} for a in range(8) for b in range(5)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = {word: n for n, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    for seed, name in enumerate(("base", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(ids), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1,
                             bos_token_id=None, initializer_range=0.2)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place / name)
        fast.save_pretrained(place / name)
    return place


def words(root: Path, *more: str, teacher: str = "teacher", base: str = "base") -> list[str]:
    data = [] if "data=instructions" in more else ["data=text", f"data.files={root / 'text.txt'}"]
    none = "teacher=none" in more
    named = [] if none else ["teacher=hub", f"teacher.name={root / teacher}"]
    return [*data, "data.seq_len=32", "data.val_rows=4", "student=hub", f"student.name={root / base}", *named,
            "adapter=lora", "adapter.rank=4", "lr.peak=1e-2", f"trainer.steps={STEPS}", "trainer.checkpoint_every=2",
            *more]  # fmt: skip


INSTRUCTIONS = ("data=instructions", "data.template=plain", "data.val_share=0.2")


def interrupted(place: Path, monkeypatch, step: int, *typed: str) -> Path:
    """The folder of a run that was asked to end in this step."""
    real = DistillationModule.training_step

    def training_step(module, *args):
        requests.pending |= module.global_step == step
        real(module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", training_step)
        with pytest.raises(Preempted):
            here(place, *typed)
    requests.pending = False
    return next(path.parent.parent for path in place.glob("*/checkpoints/*.ckpt"))


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("adapter.head=true", "adapter.targets=[q_proj]", "adapter.rslora=true", "loss=jsd", "routing=entropy"),
        pytest.param(("teacher=none", "logits=none"), marks=pytest.mark.slow),
        pytest.param(("trainer.precision=bf16",), marks=pytest.mark.slow),
        pytest.param(("logits=offline", "truncation=top_k", "truncation.k=5"), marks=pytest.mark.slow),
        pytest.param((*INSTRUCTIONS, "rollout=student", "rollout.share=1", "alpha.peak=1"), marks=pytest.mark.slow),
        pytest.param((*INSTRUCTIONS, "rollout=mixed", "loss=minillm"), marks=pytest.mark.slow),
    ],
    ids=["online", "head", "lm", "bf16", "offline", "student", "mixed"],
)
def test_a_run_resumes_exactly_from_a_checkpoint_without_the_frozen_weights(root, tmp_path, monkeypatch, more):
    if "data=instructions" in more:
        more = (*more, f"data.files={root / 'rows.jsonl'}")
    typed = words(root, *more)
    whole = here(tmp_path / "whole", *typed)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns(whole.name))
    cut = interrupted(tmp_path / "cut", monkeypatch, 3, *typed)
    (path,) = (cut / "checkpoints").glob("*3.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    count = 3 if "adapter.targets=[q_proj]" in more else 14
    assert len(checkpoint["state_dict"]) == 2 * count and all("lora_" in name for name in checkpoint["state_dict"])
    assert len(checkpoint["optimizer_states"][0]["state"]) == 2 * count
    assert here(tmp_path / "cut", *typed) == cut and outcome(cut) == outcome(whole)
    before, after = (load_file(place / "model.safetensors") for place in (root / "base", whole / "student"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == count and not any("norm" in name or "embed" in name for name in changed)


def test_another_seed_begins_with_another_adapter(root, tmp_path):
    runs = [here(tmp_path, *words(root, "teacher=none", "logits=none", f"seed={seed}")) for seed in (0, 1)]
    one, other = (load_file(run / "student" / "model.safetensors") for run in runs)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


def test_other_weights_under_an_adapter_do_not_resume_in_silence(root, tmp_path, monkeypatch):
    """Change the weights of a model whose name has no digest, as one of the Hub."""
    monkeypatch.setattr(files, "folder_fingerprint", lambda name: None)
    base = Path(shutil.copytree(root / "base", tmp_path / "base"))
    typed = words(tmp_path, "teacher=none", "logits=none", f"data.files={root / 'text.txt'}")
    interrupted(tmp_path / "runs", monkeypatch, 3, *typed)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with refused(why="other weights under its adapter", commands="checkpoints"):
        here(tmp_path / "runs", *typed)


def test_a_run_exports_a_plain_student_and_if_asked_the_adapter_alone(root, tmp_path, capsys):
    run = here(tmp_path, *words(root, "adapter.export=both"))
    student = logits_of(run / "student")
    assert not list((run / "student").glob("adapter*")) and not torch.equal(student, logits_of(root / "base"))
    adapted = causal_lm.build_model(None, str(run / "adapter"), 42, 32, "student.name")
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(IDS).logits, student, rtol=1e-4, atol=1e-5)
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(root / "base") and about["lora_alpha"] == 32
    done = result(run)
    weights = load_file(run / "student" / "model.safetensors")
    assert done["parameters"] == sum(w.numel() for w in weights.values())
    assert done["trainable_parameters"] == 4 * 2 * (4 * (32 + 32) + 3 * (32 + 48))  # rank, layers, matrices
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= done["files"].keys()
    counts = f"{done['parameters']:,} parameters + {done['trainable_parameters']:,} trainable"
    assert counts in capsys.readouterr().err and counts in (run / "student" / "README.md").read_text()
    again = here(tmp_path, *words(tmp_path, "adapter.export=both", f"student.name={run / 'adapter'}",
                                  f"teacher.name={root / 'teacher'}", f"data.files={root / 'text.txt'}",
                                  "adapter.export=merged"))  # fmt: skip
    assert result(again)["initial"]["val/lm"] == pytest.approx(done["final"]["val/lm"], abs=1e-5)


def test_a_teacher_that_is_the_model_under_the_adapter_is_in_memory_once(root, tmp_path, monkeypatch):
    """The teacher's logits are those of its files, bit for bit, also when the student has learned."""
    seen = []
    real = DistillationModule.training_step

    def training_step(module, *args):
        real(module, *args)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            teacher, student = (x.head(x.hidden_states(IDS)) for x in (module.teacher.model, module.student))
        ours = {p.data_ptr(): p.dtype for p in module.student.parameters()}
        shared = {p.data_ptr() for p in module.teacher.model.parameters()} <= ours.keys()
        seen.append((teacher, student, shared, set(ours.values())))

    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    expected = logits_of(root / "base")
    for precision in ("fp32", "bf16"):
        here(tmp_path, *words(root, f"trainer.precision={precision}", "alpha.peak=0.5", teacher="base"))
        for teacher, student, shared, kinds in seen:
            assert shared and kinds == {torch.float32}
            assert torch.equal(teacher, expected) and not torch.equal(student, expected)
        assert len(seen) == STEPS
        seen.clear()


def test_a_teacher_that_is_fine_tuned_first_has_weights_of_its_own(root, tmp_path):
    typed = words(root, *INSTRUCTIONS, f"data.files={root / 'rows.jsonl'}", "teacher.sft=true", "teacher.steps=2",
                  teacher="base")  # fmt: skip
    done = result(here(tmp_path, *typed))
    assert done["final"]["val/teacher_lm"] != pytest.approx(done["initial"]["val/lm"], abs=1e-4)


def test_a_plan_counts_the_weights_that_learn(root, tmp_path):
    (estimate,) = planner.estimate(small_config(tmp_path, *words(root, teacher="base"))).values()
    assert (estimate.parameters, estimate.trainable) == (20_256, 3_968)
    assert estimate.temporary_disk == 2 * 12 * 3_968  # two checkpoints of weights and moments
    assert step_timing._is_under_adapter(small_config(tmp_path, *words(root, teacher="base")))
    assert not step_timing._is_under_adapter(small_config(tmp_path, *words(root)))


def test_names_and_axes_have_the_adapter(root, tmp_path):
    def named(*more: str) -> str:
        return Plan.from_config(small_config(tmp_path, *words(root, *more))).run.name

    usual = named()
    assert named("adapter.export=merged") == usual
    others = [named(word) for word in ("adapter.rank=8", "adapter.alpha=4", "adapter.targets=[q_proj]",
                                       "adapter.rslora=true", "adapter.head=true", "adapter.export=both")]  # fmt: skip
    assert len({usual, *others}) == 7
    flat = small_config(tmp_path, *words(root, "adapter.targets=[q_proj,v_proj]")).flat()
    shown = identity.axes(flat, {})
    assert {"adapter": "lora", "adapter_rank": 4, "adapter_targets": "q_proj v_proj"}.items() <= shown.items()
    assert " lora4 " in identity.readable("fkl-x-123456", flat)
    plain = config_of(["student=hub", f"student.name={root / 'base'}"]).flat()
    assert plain["adapter"] == "none" and not [key for key in identity.axes(plain, {}) if "adapter" in key]


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        (("optim=mup",), {"conflict": "optim=mup", "hint": "optim=adamw lr.peak=2e-4"}),
        (("trainer=fsdp", "trainer.batch=4"), {"conflict": "trainer.strategy=fsdp", "hint": "trainer.strategy=ddp"}),
        (("logits=cotrained",), {"conflict": "logits=cotrained", "hint": "logits=online"}),
        (("data=instructions", "rollout=student", "rollout.engine=vllm"), {"conflict": "rollout.engine=vllm"}),
        (("logits=none", "record=top_k"), {"conflict": "record=top_k"}),
    ],
)
def test_what_cannot_treat_an_adapter_is_refused(more, fields):
    with refused(option="adapter", got="lora", **fields):
        config_of(["student=hub", "student.name=x", "adapter=lora", *more])


def test_an_adapter_for_a_random_student_is_refused():
    with refused(option="adapter", got="lora", conflict="student.size=200k", hint="start=pretrained"):
        config_of(["adapter=lora"])
    with refused(option="adapter", got="lora", conflict="start.keep=random", hint="leave start.keep out"):
        config_of(["adapter=lora", "start=teacher", "start.keep=random"])
    config = config_of(["adapter=lora", "start=pretrained"])
    assert config.optim.name == "AdamW" and config.lr.args["peak"] == 2e-4
    assert Plan.from_config(config).start.adapter.is_none


def test_a_setting_of_another_type_is_refused(root, tmp_path):
    for word, need in (("adapter.rank=1.5", "a whole number"), ("adapter.targets=[1]", "a text or a list")):
        name = word.partition("=")[0]
        with refused(option=name, need=need):
            here(tmp_path, *words(root, word))


@pytest.mark.slow
def test_two_ranks_train_the_adapter_that_one_does(root, tmp_path):
    typed = words(root, "trainer.batch=4", "trainer.micro_batch=2", "trainer.val_every=50", "logger=none")
    for place, more in (("one", ()), ("two", ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"))):
        command = [sys.executable, str(TRAIN), *more, *typed, f"root={tmp_path / place}"]
        process = python(command, tmp_path)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    one, two = (result(folder(tmp_path / place, "fkl")) for place in ("one", "two"))
    assert one["final"]["val/lm"] == pytest.approx(two["final"]["val/lm"], abs=1e-5)
    assert one["trainable_parameters"] == two["trainable_parameters"]


@pytest.mark.real
@pytest.mark.skipif("KD_REAL_MODELS" not in os.environ, reason="no pretrained models here")
def test_a_pretrained_pair_trains_and_its_merged_student_is_the_adapted_one(tmp_path):
    """Load the student with plain transformers, and the adapter with plain PEFT. They have one embedding for both."""
    from peft import PeftModel

    real = Path(os.environ["KD_REAL_MODELS"])
    (tmp_path / "text.txt").write_text("\n\n".join(f"Number {n} comes before number {n + 1}." for n in range(300)))
    typed = ["data=text", f"data.files={tmp_path / 'text.txt'}", "data.seq_len=32", "data.val_rows=2", "student=hub",
             f"student.name={real / 'smollm2-15l'}", "teacher=hub", f"teacher.name={real / 'smollm2-135m'}",
             "adapter=lora", "adapter.export=both", "trainer.steps=2", "trainer.batch=1",
             "trainer.micro_batch=1"]  # fmt: skip
    run = here(tmp_path / "runs", *typed)
    base = AutoModelForCausalLM.from_pretrained(real / "smollm2-15l", dtype=torch.float32)
    with torch.no_grad():
        before = base(IDS).logits
        adapted = PeftModel.from_pretrained(base, str(run / "adapter"))(IDS).logits
    student = logits_of(run / "student")
    assert (student - adapted).abs().max() < 1e-3 < (student - before).abs().max()

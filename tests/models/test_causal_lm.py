"""Heads are the models' own, and vocabularies fit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kd.models import causal_lm, flops
from kd.rollout import generate
from tests.models.examples import CONFIGS, IDS, NO_ATTENTION, T, V, build, text_and_tokenizer, words_as_tokens
from tests.refusals import refused
from tests.small import here

pytestmark = pytest.mark.usefixtures("connections")

every_model = pytest.mark.parametrize("name", CONFIGS)


def test_pretrained_models_have_no_dropout(saved):
    """Compare logits: train mode and evaluation mode give the same."""
    assert CONFIGS["gpt2"].resid_pdrop == CONFIGS["opt"].dropout == 0.1
    for name in ("gpt2", "opt"):
        model = causal_lm.build_model(None, str(saved / name), V, T, "student.name").model
        outputs = [mode().forward(IDS).logits for mode in (model.train, model.eval, model.train)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_models_without_attention_are_read_and_counted(tmp_path, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(NO_ATTENTION[name]).train()  # none has dropout
    model.save_pretrained(tmp_path)
    causal = build(tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(causal.head(causal.hidden_states(IDS)), expected, rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / "model.safetensors")  # reading changes no weights, as RWKV's own code does
    assert all(torch.equal(value, saved[key]) for key, value in causal.model.state_dict().items() if key in saved)
    cost = flops.cost(causal.model, T)
    assert cost.flops_per_token == flops.cost(causal.model, 10 * T).flops_per_token
    assert cost.flops_per_token == pytest.approx(2 * (cost.non_embedding + V * 32))
    with refused(why="cannot read a text piece by piece"):
        generate.check_cache(causal)


# Heads


@every_model
def test_head_of_hidden_states_is_what_the_model_says(saved, name):
    causal = build(saved / name).eval()
    with torch.no_grad():
        expected = causal.model(input_ids=IDS).logits
        actual = causal.head(causal.hidden_states(IDS))
    assert expected.abs().max() > 0.02
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("gemma2", "softcap"), ("cohere", "scale"), ("granite", "scale")])
def test_head_without_its_cap_or_scale_is_refused(saved, name, part):
    causal = build(saved / name)
    setattr(causal.head, part, {"softcap": None, "scale": 1}[part])
    with refused(option="teacher.name", why=("the output layer of ", "is off", "%")):
        causal.check("teacher.name")


@pytest.mark.parametrize(
    "odd", [lambda x: 1.01 * x, lambda x: x + 0.01, lambda x: 0.2 * torch.tanh(x / 0.2), lambda x: x.flip(-1)]
)
def test_head_that_does_something_unknown_is_refused(saved, odd):
    causal = build(saved / "llama")
    forward = causal.model.forward

    def strange(**inputs):
        out = forward(**inputs)
        out.logits = odd(out.logits)
        return out

    causal.model.forward = strange
    with refused(option="teacher.name", why=("LlamaForCausalLM", "does something there that kd does not know")):
        causal.check("teacher.name")


@pytest.mark.parametrize(("size", "name"), [("100k", None), (None, "llama")])
def test_every_model_is_checked_when_it_is_built(saved, monkeypatch, size, name):
    monkeypatch.setattr(causal_lm.Head, "forward", lambda self, hidden: 2 * self.output(hidden)[..., : self.vocab])
    with refused(option="student.name", why="is off"):
        causal_lm.build_model(size, name and str(saved / name), V, T, "student.name")


@pytest.mark.parametrize("training", [True, False])
def test_check_leaves_the_model_as_it_is(saved, training):
    causal = build(saved / "gpt2").train(training)  # it has dropout
    before = torch.get_rng_state()
    causal.check("teacher.name")
    assert causal.model.training == training and torch.equal(torch.get_rng_state(), before)


def test_head_is_no_second_copy_of_the_weights(saved):
    causal = build(saved / "llama")
    assert sum(p.numel() for p in causal.parameters()) == sum(p.numel() for p in causal.model.parameters())
    assert len(causal.state_dict()) == len(causal.model.state_dict())
    assert causal.head.output.weight is causal.model.lm_head.weight


@every_model
def test_padded_vocabulary_is_cut_and_renormalised(saved, name):
    causal = build(saved / name, vocab=80).eval()
    with torch.no_grad():
        p = causal.head(causal.hidden_states(IDS)).softmax(-1)
        whole = causal.model(input_ids=IDS).logits.softmax(-1)[..., :80]
    assert p.shape == (2, T, 80) and (whole.sum(-1) < 0.95).all()
    torch.testing.assert_close(p, whole / whole.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


# What does not fit


def test_tokenizer_larger_than_the_head_is_refused(saved):
    with refused(option="teacher.name", why="the model knows 90 tokens and the tokenizer 91", hint="data.tokenizer"):
        build(saved / "llama", vocab=91)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "pythia"])
def test_rows_longer_than_the_model_reads_are_refused(saved, name):
    build(saved / name, seq_len=64)
    with refused(option="teacher.name", why="reads at most 64 tokens", hint="data.seq_len=64"):
        build(saved / name, seq_len=65)


class Vocabulary(dict):
    get_vocab = dict.copy


def test_same_vocabulary_is_token_for_token():
    ours = Vocabulary(a=0, b=1, c=2)
    causal_lm.check_same_vocabulary(ours, Vocabulary(c=2, b=1, a=0), "teacher.name=x")
    for theirs, differing in (({"a": 1, "b": 0, "c": 2}, 2), ({"a": 0, "b": 1}, 1), ({"a": 0, "b": 1, "d": 2}, 2)):
        why = (f"its tokenizer has {len(theirs)} tokens and the data's 3", f" {differing} of them differ")
        with refused(option="teacher.name", got="x", why=why):
            causal_lm.check_same_vocabulary(ours, Vocabulary(theirs), "teacher.name=x")
    with refused(option="teacher.name", got="x", why="has 1,500 tokens and the data's 3"):
        causal_lm.check_same_vocabulary(ours, Vocabulary({str(i): i for i in range(1500)}), "teacher.name=x")


def test_a_model_that_is_not_run_as_others_are_is_refused(saved, monkeypatch):
    monkeypatch.setattr(causal_lm.CausalLM, "hidden_states", lambda self, ids: ids.no_such_thing)
    with refused(option="teacher.name", why=("LlamaForCausalLM could not be run", "AttributeError")):
        build(saved / "llama")


def test_a_model_without_a_cache_is_refused_before_it_trains_on_instructions(tmp_path):
    _, name = text_and_tokenizer(tmp_path)
    torch.manual_seed(0)
    transformers.MambaForCausalLM(NO_ATTENTION["mamba"]).save_pretrained(name)
    rows = [{"prompt": f"w{n % 40} w{n // 40}", "response": f"w{n % 7}"} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = f"data=instructions data.files={tmp_path / 'a.jsonl'} data.template=plain student=hub student.name={name}"
    words += " data.seq_len=16 data.val_rows=2 logits=none teacher=none optim=adamw trainer.steps=3"
    with refused(why="MambaForCausalLM cannot read a text piece by piece"):
        here(tmp_path / "runs", *words.split())
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_renamed_special_tokens_are_named_and_accepted_where_that_is_typed():
    ours, theirs = words_as_tokens("a", "b", special=("<end>",)), words_as_tokens("a", "b", special=("<turn>",))
    why, hint = "id 2 is '<end>' in the data's and '<turn>' in its", ("ids are the same", "token_names=any")
    with refused(option="teacher.name", got="x", why=why, hint=hint):
        causal_lm.check_same_vocabulary(ours, theirs, "teacher.name=x")
    causal_lm.check_same_vocabulary(ours, theirs, "teacher.name=x", by_ids=True)


@pytest.mark.parametrize("theirs", [("a", "c"), ("b", "a"), ("a",), ("a", "b", "c")])
def test_other_tokens_and_other_ids_are_refused_whatever_is_typed(theirs):
    ours, other = words_as_tokens("a", "b", special=("<end>",)), words_as_tokens(*theirs, special=("<end>",))
    for by_ids in (False, True):
        with refused(why=(" is ", "in the data's and "), hint="choose a teacher and a student of one family"):
            causal_lm.check_same_vocabulary(ours, other, "teacher.name=x", by_ids)

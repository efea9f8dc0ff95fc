"""data.pack=true: several examples to a row, each as it is alone."""

import json

import numpy as np
import pytest
import torch
import transformers

from kd.data import packing
from kd.data.batches import FIRST, IGNORE, NOT_LEARNED, to_batch
from kd.data.counts import in_words
from kd.experiment.dependencies import corpus
from kd.models.causal_lm import CausalLM
from kd.objective.token_selection import uncertainty
from tests.data.examples import BYTES, pairs, tokenizer
from tests.refusals import refused
from tests.small import here, result, small_config

SEQ_LEN = 40


def examples(count: int = 60) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [("q" * rng.integers(1, 6) + str(n), "a" * rng.integers(1, 25) + str(n)) for n in range(count)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Some examples, one to a row, and packed."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer().save_pretrained(folder / "tokenizer")
    options = BYTES | {"seq_len": SEQ_LEN, "tokenizer": str(folder / "tokenizer")}
    return [packing.pack(pairs(*examples(), prompt_len=10), folder, **options, pack=pack) for pack in (False, True)]


def batch_of(packed):
    rows = packed.train
    return to_batch(
        rows, np.arange(len(rows)), np.zeros(rows[:, 1:].shape, int), packed.train_spans, packed.boundary,
        packed.train_marks,
    )  # fmt: skip


def test_each_example_is_once_in_a_row_and_marked(both):
    alone, packed = both
    assert len(packed.train) < 0.7 * len(alone.train) and packed.train_spans is None
    seen = []
    for row, marks in zip(packed.train, packed.train_marks, strict=True):
        for tokens, part in zip(*(np.split(x, np.flatnonzero(marks == FIRST)[1:]) for x in (row, marks)), strict=True):
            used = np.flatnonzero(part == 0)[-1] + 1
            assert (
                part[0] == FIRST and (part[used:] == NOT_LEARNED).all() and (tokens[used:] == packed.eos_token_id).all()
            )
            seen.append((tuple(tokens[:used]), int((part == 0).sum())))
    expected = [
        (tuple(row[:total]), total - prompt)
        for row, (prompt, total) in zip(alone.train, alone.train_spans, strict=True)
    ]
    assert sorted(seen) == sorted(expected)


def test_validation_rows_hold_one_prompt_each_as_ever(both):
    alone, packed = both
    assert (packed.val == alone.val).all() and (packed.val_spans == alone.val_spans).all() and packed.val_marks is None
    assert packed.bytes_per_token == alone.bytes_per_token
    assert packed.counts["used"] == alone.counts["used"] and packed.counts["rows"]["train"] == len(packed.train)
    assert f"responses in {len(packed.train)} rows for training" in in_words(packed.counts)
    assert packed.mean_target_tokens * len(packed.train) == pytest.approx(alone.mean_target_tokens * len(alone.train))


def models() -> tuple[CausalLM, CausalLM]:
    """Student and teacher in float64, whose layer norms compute in float64 too."""
    models_by_seed = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=SEQ_LEN)
        model = transformers.GPT2LMHeadModel(config).double().eval()
        torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
        models_by_seed.append(CausalLM(model, 259))
    return models_by_seed[0], models_by_seed[1]


def losses(packed, student: CausalLM, teacher: CausalLM) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Summed forward KL and language modelling of all rows, in float64, and the gradients of the student."""
    batch = batch_of(packed)
    mask = batch.labels != IGNORE
    q, p = (model.head(model.hidden_states(*batch.inputs)[mask]).log_softmax(-1) for model in (student, teacher))
    kd, lm = (p.exp() * (p - q)).sum(), -q.gather(-1, batch.labels[mask][:, None]).sum()
    student.zero_grad()
    (kd + lm).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return [kd.item(), lm.item()], gradients


def test_losses_and_gradients_are_those_of_the_examples_one_to_a_row(both):
    student, teacher = models()
    (first, gradients), (second, packed_gradients) = (losses(packed, student, teacher) for packed in both)
    assert second == pytest.approx(first, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-9, atol=1e-11)
    assert min(first) > 1  # nats


def test_information_about_tokens_is_that_of_each_example(both):
    """A token selection computes the same for each token, in another order."""
    _, teacher = models()
    tokens = []
    for packed in both:
        batch = batch_of(packed)
        mask = batch.labels != IGNORE
        logp = teacher.head(teacher.hidden_states(*batch.inputs)[mask]).log_softmax(-1)
        of_label = logp.gather(-1, batch.labels[mask][:, None])[:, 0]
        hard = uncertainty(lambda measure, p=of_label: p.exp()).token_info.is_hard
        tokens.append(sorted(zip(batch.labels[mask].tolist(), of_label.round(decimals=9).tolist(), hard.tolist())))
    assert [token[::2] for token in tokens[0]] == [token[::2] for token in tokens[1]]
    assert [token[1] for token in tokens[0]] == pytest.approx([token[1] for token in tokens[1]], abs=1e-8)


def test_a_limit_of_tokens_takes_the_same_examples(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = BYTES | {"seq_len": SEQ_LEN, "tokenizer": str(tmp_path / "tokenizer"), "tokens": 300}
    packs = [packing.pack(pairs(*examples(), prompt_len=10), tmp_path, **options, pack=pack) for pack in (False, True)]
    assert packs[0].counts["used"] == packs[1].counts["used"] and packs[0].folder != packs[1].folder


@pytest.mark.parametrize("rollout", ["student", "mixed", "teacher", "pairs"])
def test_rollouts_are_refused(rollout, tmp_path):
    losses = {"mixed": ["loss=minillm"], "pairs": ["loss=distillm2"]}.get(rollout, [])
    with refused(option="rollout", got=rollout, conflict="data.pack=true", why="several"):
        small_config(tmp_path, "data=instructions", "data.pack=true", f"rollout={rollout}", *losses)


def test_plain_text_is_refused(tmp_path):
    with refused(option="data.pack", got=True, why="full anyway"):
        corpus(small_config(tmp_path, "data=python", "data.pack=true"))
    with refused(option="data.isolate", hint="data.pack=true"):
        corpus(small_config(tmp_path, "data=instructions", "data.isolate=true"))


@pytest.mark.slow
def test_a_run_on_packed_examples_ends_with_responses(tmp_path):
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in examples(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "plain.txt").write_text("\n\n".join(f"{prompt} {response}" for prompt, response in examples(300)))
    words = ("data=instructions", f"data.files={tmp_path}/pairs.jsonl", "plain=text",
             f"plain.files={tmp_path}/plain.txt",
             "start=sft", "start.steps=2", "start.sft_steps=2", "data.seq_len=64", "data.vocab=280", "data.val_rows=4",
             "data.pack=true", "data.val_share=0.2", "data.template=plain")  # fmt: skip
    final = [result(here(tmp_path, *words, *more)) for more in (("logits=online",), ("logits=offline", "record=full"))]
    assert {"val/lm", "val/rouge_l"} <= final[0]["final"].keys()
    assert final[1]["final"]["val/lm"] == pytest.approx(final[0]["final"]["val/lm"], rel=1e-4)
    assert final[0]["train_rows"] < final[0]["data"]["used"]["train"]

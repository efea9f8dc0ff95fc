"""Generated text: against Hugging Face, against the probabilities of a whole forward pass, and by count."""

import math
from itertools import product

import pytest
import torch
import transformers
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kd.data.batches import IGNORE, Batch
from kd.models.causal_lm import CausalLM
from kd.objective.chunked import log_probabilities
from kd.objective.token_info import TokenInfo
from kd.parallel import collectives
from kd.rollout import generate
from kd.rollout.generate import sample
from tests.cases import close, logits
from tests.models.examples import CONFIGS, GATED, V
from tests.objective.test_truncation import ODDS, odds
from tests.refusals import refused

T, END = 15, 3
MODELS = CONFIGS | {
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=7),  # whose cap makes no ties
    "mistral": transformers.MistralConfig(**GATED, sliding_window=5),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=6, eos_token_id=0, bos_token_id=0),
    "bloom": transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
}


def model(name: str = "llama", seed: int = 0, vocab: int = V) -> CausalLM:
    """A small model that says very different things at different places."""
    torch.manual_seed(seed)
    causal = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    for parameter in causal.parameters():
        if parameter.ndim > 1:
            parameter.data *= 5
    return CausalLM(causal, vocab)


def batch(prompts: list[int], length: int = T) -> Batch:
    """Rows whose prompts have so many tokens; whose responses are to be written anew."""
    tokens = torch.arange(len(prompts) * (length + 1)).view(-1, length + 1) * 7 % 80 + 5
    labels = tokens[:, 1:].clone()
    for row, size in enumerate(prompts):
        labels[row, : size - 1] = IGNORE
        labels[row, length - 2 :] = IGNORE if size < length - 2 else labels[row, length - 2 :]  # padding behind it
    return Batch(tokens[:, :-1].clone(), labels, torch.arange(len(prompts)), torch.zeros(len(prompts), length).long())


def rows_of(batch: Batch, rows) -> Batch:
    return Batch(*(x[rows] for x in batch[:4]))


def seeds(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count) * 1_000_003


def tokens_of(batch: Batch) -> torch.Tensor:
    """Rows [B, T + 1], with the padding that labels do not hold."""
    last = torch.where(batch.labels[:, -1:] == IGNORE, END, batch.labels[:, -1:])
    return torch.cat([batch.ids, last], -1)


def whole(model: CausalLM, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the labels [B, T] by one forward pass; 0 where none is counted."""
    with torch.no_grad():
        logp = log_probabilities(model.head, model.eval().hidden_states(batch.ids))
    mask = batch.labels != IGNORE
    return logp.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0] * mask


PROMPTS = [1, 4, 9, T - 1, T, 2]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_hugging_face(name):
    causal, given = model(name), batch(PROMPTS)
    ours = sample(given, END, seeds(6), causal, temperature=0)
    width = max(PROMPTS)
    ids, mask = torch.full((6, width), END), torch.zeros(6, width, dtype=torch.long)
    for row, size in enumerate(PROMPTS):
        ids[row, width - size :], mask[row, width - size :] = given.ids[row, :size], 1
    kind = transformers.GenerationConfig(do_sample=False, max_new_tokens=T, eos_token_id=END, pad_token_id=END)
    theirs = causal.model.eval().generate(ids, attention_mask=mask, generation_config=kind)[:, width:]
    for row, size in enumerate(PROMPTS):
        expected = theirs[row, : T + 1 - size]
        assert torch.equal(tokens_of(ours)[row, size:], expected)
        assert torch.equal(ours.ids[row, :size], given.ids[row, :size])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_labels_are_what_was_written_shifted_and_no_padding(name):
    causal, given = model(name), batch(PROMPTS * 8)
    ours = sample(given, END, seeds(48), causal, temperature=2.0)
    ends = 0
    for row, size in enumerate(PROMPTS * 8):
        tokens = tokens_of(ours)[row].tolist()
        stop = tokens.index(END, size) + 1 if END in tokens[size:] else T + 1  # the end counts, what follows does not
        ends += stop <= T
        assert ours.labels[row].tolist() == [IGNORE] * (size - 1) + tokens[size:stop] + [IGNORE] * (T + 1 - stop)
        assert set(tokens[stop:]) <= {END}
    assert 3 < ends < 40
    assert ours.row_ids is given.row_ids and ours.position_seeds is given.position_seeds and ours.teacher_rows is None


def test_a_row_without_a_response_stays_as_it_is():
    given = batch([4, 4, 4])
    given.labels[1] = IGNORE
    ours = sample(given, END, seeds(3), model())
    assert torch.equal(ours.ids[1], given.ids[1]) and (ours.labels[1] == IGNORE).all()
    assert all((x[1] == 0).all() for x in ours.token_info.provided().values())
    alone = sample(rows_of(given, [1]), END, seeds(1), model())
    assert torch.equal(alone.ids[0], given.ids[1]) and (alone.labels == IGNORE).all()


@pytest.mark.parametrize("most", [1, 3, 100])
def test_at_most_so_many_tokens(most):
    ours = sample(batch(PROMPTS), END, seeds(6), model(), max_tokens=most)
    room = (T + 1 - torch.tensor(PROMPTS)).clamp(max=most)
    assert ((ours.labels != IGNORE).sum(-1) <= room).all() and ((ours.labels != IGNORE).sum(-1) == room).any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "bloom"])
def test_what_is_known_is_what_a_whole_pass_says(name):
    student, teacher = model(name), model("llama", 1)
    ours = sample(batch(PROMPTS * 2), END, seeds(12), student, teacher, share=0.3)
    log_q, log_p = whole(student, ours), whole(teacher, ours)
    close(ours.token_info.student_logp, log_q, rtol=0, atol=1e-5 * log_q.abs().max())
    close(ours.token_info.teacher_logp, log_p, rtol=0, atol=1e-5 * log_p.abs().max())
    mask = ours.labels != IGNORE
    by_hand = mask / (0.3 * (log_p - log_q).double().exp() + 0.7)
    close(ours.token_info.importance.double(), by_hand, rtol=1e-3, atol=1e-6)
    assert torch.equal(ours.token_info.by_student, mask.float())
    assert ours.token_info.advantage is None


def test_what_one_model_writes_says_nothing_of_the_other():
    causal = model()
    alone = sample(batch(PROMPTS), END, seeds(6), causal).token_info
    assert alone.teacher_logp is None and (alone.importance - (alone.by_student)).abs().max() < 1e-5
    teacher = sample(batch(PROMPTS), END, seeds(6), teacher=causal).token_info
    assert teacher.student_logp is None and teacher.importance is None and not teacher.by_student.any()
    assert torch.equal(teacher.teacher_logp, alone.student_logp)


@pytest.mark.parametrize(("share", "same"), [(0.0, "student"), (1.0, "teacher")])
def test_ends_of_the_mixture_are_one_model(share, same):
    models = {"student": model(), "teacher": model("gpt2", 1)}
    both = sample(batch(PROMPTS), END, seeds(6), **models, share=share)
    alone = sample(batch(PROMPTS), END, seeds(6), **{same: models[same]})
    assert torch.equal(both.labels, alone.labels)
    assert both.token_info.student_logp is not None and both.token_info.teacher_logp is not None


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_row_is_the_same_alone_in_any_order_and_in_any_batch(temperature):
    student, teacher = model("gpt2"), model("llama", 1)

    def written(rows: list[int]) -> tuple:
        sampled = sample(rows_of(given, rows), END, seed[rows], student, teacher, 0.5, temperature)
        info = sampled.token_info
        return sampled.ids, sampled.labels, info.student_logp, info.teacher_logp, info.importance

    given, seed = batch(PROMPTS), seeds(6)
    together, order = written([0, 1, 2, 3, 4, 5]), [5, 2, 0, 3, 1, 4]
    for row in range(6):
        for a, b in zip(written([row]), together, strict=True):
            close(a[0].double(), b[row], rtol=1e-4, atol=1e-4)
    for a, b in zip(written(order), together, strict=True):
        close(a.double(), b[order], rtol=1e-4, atol=1e-4)


def test_other_seeds_write_other_text():
    causal, given = model(), batch([4] * 20)
    first, again, other = (sample(given, END, seeds(20, first), causal).labels for first in (0, 0, 1000))
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = {tuple(row.tolist()) for row in sample(batch([4])._replace(), END, seeds(1), causal).labels}
    assert len(rows) == 1
    same = Batch(*(x[:1].expand(20, *x.shape[1:]).clone() for x in given[:4]))
    assert len({tuple(row.tolist()) for row in sample(same, END, seeds(20), causal).labels}) > 15


COUNT = 4000


def counts(**given) -> torch.Tensor:
    """Return the count of each token as the first after one prompt, in COUNT samples."""
    one = batch([6])
    many = Batch(*(x.expand(COUNT, *x.shape[1:]).clone() for x in one[:4]))
    labels = sample(many, END, seeds(COUNT), max_tokens=1, **given).labels[:, 5]
    return labels.bincount(minlength=VOCAB).double()


VOCAB = 20  # of the models in the tests by count


def log_probabilities_of_next(causal: CausalLM) -> torch.Tensor:
    """Log-probabilities of the token after the prompt of counts()."""
    with torch.no_grad():
        return log_probabilities(causal.head, causal.eval().hidden_states(batch([6]).ids[:, :6]))[0, -1].double()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_tokens_come_as_often_as_the_mixture_says(share):
    student, teacher = model("llama", 2, VOCAB), model("gpt2", 3, VOCAB)
    mixture = share * log_probabilities_of_next(teacher).exp() + (1 - share) * log_probabilities_of_next(student).exp()
    observed = counts(student=student, teacher=teacher, share=share)
    assert odds(observed, COUNT * mixture) > ODDS
    assert (
        odds(
            observed,
            COUNT
            * (
                (1 - share) * log_probabilities_of_next(teacher).exp()
                + share * log_probabilities_of_next(student).exp()
            ),
        )
        < ODDS
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, None, 1.0), (2.0, None, 1.0), (1.0, 5, 1.0), (1.0, None, 0.7), (1.5, 8, 0.6)],
)
def test_tokens_come_as_often_as_hugging_face_says(temperature, top_k, top_p):
    causal = model("llama", 2, VOCAB)
    scores = TemperatureLogitsWarper(float(temperature))(None, log_probabilities_of_next(causal)[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    close(
        generate._softened(log_probabilities_of_next(causal)[None], temperature, top_k, top_p), scores.log_softmax(-1)
    )
    support = scores[0] > -math.inf
    observed = counts(student=causal, temperature=temperature, top_k=top_k, top_p=top_p)
    assert not observed[~support].any() and support.sum() > 1
    assert odds(observed[support], COUNT * scores.softmax(-1)[0, support]) > ODDS


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), list(product((0.5, 3.0), (None, 3, 50), (0.3, 1.0))))
def test_what_tokens_are_drawn_from_is_that_of_hugging_face(temperature, top_k, top_p):
    logp = logits(1, 40, 30).log_softmax(-1)
    scores = TemperatureLogitsWarper(temperature)(None, logp)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    close(generate._softened(logp, temperature, top_k, top_p), scores.log_softmax(-1))


def test_importance_is_of_what_was_drawn_from():
    """Sample at another temperature: importance has mean 1, and importance * f has the mean of f under the student."""
    causal = model("llama", 2, VOCAB)
    one = batch([6])
    many = Batch(*(x.expand(COUNT, *x.shape[1:]).clone() for x in one[:4]))
    ours = sample(many, END, seeds(COUNT), causal, temperature=2.5, max_tokens=1)
    weight = ours.token_info.importance[:, 5].double()
    assert weight.mean() == pytest.approx(1, abs=4 * weight.std().item() / COUNT**0.5)
    mass = torch.zeros(VOCAB, dtype=torch.float64).index_add(0, ours.labels[:, 5], weight) / COUNT
    assert (mass - log_probabilities_of_next(causal).exp()).abs().max() < 0.03
    assert (
        counts(student=causal, temperature=2.5) / COUNT - log_probabilities_of_next(causal).exp()
    ).abs().max() > 0.05


# What a training step leaves and finds


def test_models_stay_in_the_mode_they_were_in_and_dropout_is_off_meanwhile():
    config = transformers.GPT2Config(**{**CONFIGS["gpt2"].to_dict(), "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    causal = CausalLM(transformers.GPT2LMHeadModel(config), V).train()
    ours = sample(batch(PROMPTS), END, seeds(6), causal)
    assert causal.training and causal.model.transformer.drop.training
    close(ours.token_info.student_logp, whole(causal, ours), rtol=0, atol=1e-4)
    causal.eval()
    sample(batch(PROMPTS), END, seeds(6), causal)
    assert not causal.training


def test_a_step_under_autocast_still_learns():
    """Weights that autocast has cast while nothing needed a gradient are not those of the step."""
    causal, gradients = model().train(), []
    for before in (False, True):
        causal.zero_grad()
        given = batch(PROMPTS)
        with torch.autocast("cpu", torch.bfloat16):
            if before:
                sample(given, END, seeds(6), causal)
            log_probabilities(causal.head, causal.hidden_states(given.ids)).square().mean().backward()
        gradients.append({name: p.grad for name, p in causal.named_parameters()})
    assert all(grad is not None and torch.equal(grad, gradients[0][name]) for name, grad in gradients[1].items())


def test_no_gradient_is_kept():
    ours = sample(batch(PROMPTS), END, seeds(6), model(), model("gpt2", 1), 0.5)
    assert not any(x.requires_grad for x in ours.token_info.provided().values())


def test_compiled_models_are_not_compiled_for_every_length():
    causal = model()
    plain = sample(batch(PROMPTS), END, seeds(6), causal)
    causal.model.base_model.compile(backend=lambda *_: pytest.fail("compiled"))
    assert torch.equal(sample(batch(PROMPTS), END, seeds(6), causal).labels, plain.labels)


def test_rows_that_are_done_are_read_no_more(monkeypatch):
    causal, sizes = model(), []
    real = CausalLM.hidden_states
    sample(batch([T]), END, seeds(1), causal)  # checked once
    monkeypatch.setattr(
        CausalLM, "hidden_states", lambda self, ids, **more: (sizes.append(len(ids)), real(self, ids, **more))[1]
    )
    ours = sample(batch(PROMPTS), END, seeds(6), causal)
    left = [((ours.labels != IGNORE).sum(-1) > n).sum().item() for n in range(T)]
    assert sizes == [n for n in left if n]


# Models that read in parts what they do not read as a whole


def test_a_model_that_forgets_its_positions_is_refused(monkeypatch):
    causal = model("gpt2")
    real = CausalLM.hidden_states

    def forgetful(self, ids, **more):
        return real(self, ids, **{k: v for k, v in more.items() if k != "position_ids"})

    monkeypatch.setattr(CausalLM, "hidden_states", forgetful)
    with refused(why=("GPT2LMHeadModel cannot read", "off by"), hint="without a rollout"):
        sample(batch(PROMPTS), END, seeds(6), causal)


def test_a_model_that_forgets_its_padding_is_refused(monkeypatch):
    causal = model("llama")
    real = CausalLM.hidden_states

    def forgetful(self, ids, **more):
        return real(self, ids, **{k: v for k, v in more.items() if k != "attention_mask"})

    monkeypatch.setattr(CausalLM, "hidden_states", forgetful)
    with refused(why="LlamaForCausalLM cannot read"):
        sample(batch(PROMPTS), END, seeds(6), causal)


def test_a_model_whose_cache_keeps_too_little_is_refused(monkeypatch):
    """Check texts longer than the window; shorter ones show no difference."""
    small = transformers.MistralConfig(**GATED, sliding_window=4)
    monkeypatch.setattr(generate, "DynamicCache", lambda config: transformers.DynamicCache(config=small))
    with torch.no_grad():
        generate.check(model("mistral").eval(), 3)
        with refused(why="MistralForCausalLM cannot read"):
            generate.check(model("mistral").eval(), T)


def test_a_model_without_keys_and_values_is_refused():
    config = transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=4)
    causal = CausalLM(transformers.MambaForCausalLM(config), V)
    with refused(why=("MambaForCausalLM cannot read", "no past_key_values")):
        sample(batch(PROMPTS), END, seeds(6), causal)


# Token information


def test_token_info_is_split_and_flattened_with_its_batch():
    x = torch.arange(6 * T).view(6, T).float()
    given = batch(PROMPTS)._replace(token_info=TokenInfo(student_logp=x, by_student=-x))
    parts = list(given.split(4))
    assert [len(p.ids) for p in parts] == [4, 2] and all(p.teacher_rows is None for p in parts)
    assert torch.equal(TokenInfo.concatenate([p.token_info for p in parts]).student_logp, x)
    assert parts[0].token_info.teacher_logp is None
    mask = given.labels != IGNORE
    fields = given.token_info[mask].provided()
    assert fields.keys() == {"student_logp", "by_student"} and torch.equal(fields["student_logp"], x[mask])


def test_ranks_that_share_a_model_go_on_together(monkeypatch):
    """One that has written all of its rows still answers the others, who ask three times more."""
    causal, votes = model(), []
    alone = sample(batch([T]), END, seeds(1), causal)
    monkeypatch.setattr(generate, "FSDPModule", CausalLM)
    monkeypatch.setattr(collectives, "any_rank", lambda here: (votes.append(here), here or len(votes) < 5)[1])
    assert torch.equal(sample(batch([T]), END, seeds(1), causal).labels, alone.labels)
    assert votes == [True, False, False, False, False]

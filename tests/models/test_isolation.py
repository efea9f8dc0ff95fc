"""Documents in one row do not see each other: logits of a row are those of each document alone."""

import pytest
import torch
import transformers

from kd.models.causal_lm import CausalLM
from tests.models.examples import CONFIGS, GATED, MIXTURES, NO_ATTENTION, V
from tests.refusals import refused

LENGTHS = ((7, 12, 1, 4), (1, 1, 20, 2))  # of the documents in two rows; a window is shorter than some
ALIBI = {
    "bloom": transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "mpt": transformers.MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2),
}
WINDOWS = {  # of eight tokens
    "gemma2-window": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "gemma3-window": transformers.Gemma3TextConfig(
        **GATED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen2-window": transformers.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=0),
    "mistral-window": transformers.MistralConfig(**GATED, sliding_window=8),
}
ISOLATING = {name: config for name, config in (CONFIGS | MIXTURES | WINDOWS).items() if name != "opt"}
NOT_ISOLATING = NO_ATTENTION | ALIBI | {"opt": CONFIGS["opt"]}  # whose mask does not look at positions


def model_of(config, attention: str = "sdpa") -> CausalLM:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for weight in model.parameters():  # large ones, so that a token that is seen by mistake shows
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return CausalLM(model.eval(), V)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ISOLATING)
def test_logits_of_a_row_are_those_of_each_document_alone(name, attention):
    if attention == "sdpa" and name.startswith("gemma2"):
        pytest.skip("this model has its own soft cap in attention, and no sdpa")
    model = model_of(ISOLATING[name], attention)
    ids = torch.randint(0, V, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[i for size in sizes for i in range(size)] for sizes in LENGTHS])
    with torch.no_grad():
        together = model.head(model.hidden_states(ids, positions))
        for row, sizes in enumerate(LENGTHS):
            for start, part in zip([0, *torch.tensor(sizes).cumsum(0).tolist()], ids[row].split(sizes)):
                alone = model.head(model.hidden_states(part[None]))[0]
                torch.testing.assert_close(together[row, start : start + len(part)], alone, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(together, model.head(model.hidden_states(ids)))
    model.check_isolation("student")


@pytest.mark.parametrize("name", NOT_ISOLATING)
def test_models_without_such_a_mask_are_refused_by_name(name):
    config = NOT_ISOLATING[name]
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config), V)
    with refused(option="teacher", conflict="data.isolate=true", why=type(model.model).__name__, hint="data.isolate"):
        model.check_isolation("teacher")
    assert model.model.training


def test_a_window_that_leaks_is_noticed(monkeypatch):
    """Even in a model with new weights, where the other documents have a small effect."""
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]), V)
    model.check_isolation("student")
    real = CausalLM.hidden_states
    monkeypatch.setattr(CausalLM, "hidden_states", lambda self, ids, positions=None: real(self, ids))
    with refused(option="student", why="GPT2LMHeadModel does not keep the documents of a row apart"):
        model.check_isolation("student")

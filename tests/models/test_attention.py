"""trainer.attention: each implementation computes the same attention, and what cannot compute it is refused."""

import pytest
import torch
import transformers

from kd.models.causal_lm import CausalLM
from kd.runs.identity import identity
from tests.models.examples import CONFIGS, IDS, V
from tests.refusals import refused
from tests.small import small_config


def model(name: str, implementation: str | None) -> CausalLM:
    torch.manual_seed(0)
    built = CausalLM(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), V)
    if implementation:
        built.set_attention(implementation)
    return built.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_implementations_agree_to_rounding(name):
    with torch.no_grad():
        eager, sdpa, usual = (model(name, which).hidden_states(IDS) for which in ("eager", "sdpa", None))
    assert torch.allclose(eager, sdpa, atol=1e-5) and torch.equal(usual, sdpa)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_one_that_is_typed_computes(monkeypatch, implementation):
    calls = []
    usual = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or usual(*a, **k)
    )
    one = model("llama", implementation)
    one.hidden_states(IDS)
    assert len(calls) == (2 if implementation == "sdpa" else 0)  # one of each layer


def test_flash_attention_is_refused_where_it_is_not_installed():
    with refused(
        option="trainer.attention", got="flash_attention_2", need="flash-attn", hint=("pip install flash-attn", "sdpa")
    ):
        model("llama", "flash_attention_2")


@pytest.mark.parametrize(
    ("words", "conflict"),
    [(("trainer.precision=fp32",), "trainer.precision=fp32"),
     (("trainer.precision=bf16", "trainer.accelerator=cpu"), "trainer.accelerator=cpu")],
)  # fmt: skip
def test_flash_attention_is_refused_where_it_cannot_compute(tmp_path, words, conflict):
    with refused(option="trainer.attention", got="flash_attention_2", conflict=conflict, hint="trainer.attention=sdpa"):
        small_config(tmp_path, "trainer.attention=flash_attention_2", *words)


def test_flash_attention_of_another_kind_is_not_loaded_from_the_hub(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "_compatible_flash_implementations", ["owner/kernel"], raising=False
    )
    monkeypatch.setattr(transformers.LlamaForCausalLM, "set_attn_implementation", None)
    with refused(option="trainer.attention", got="flash_attention_2", why="LlamaForCausalLM"):
        model("llama", "flash_attention_2")


def test_an_implementation_that_a_model_lacks_is_refused():
    with refused(option="trainer.attention", got="sdpa", why="Gemma2ForCausalLM"):  # it has a soft cap
        model("gemma2", "sdpa")


def test_a_model_with_attention_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with refused(option="trainer.attention", got="eager", why="LlamaForCausalLM", hint="leave trainer.attention out"):
        model("llama", "eager")


def test_the_choice_is_in_the_name_of_a_run(tmp_path):
    usual, eager = (identity(small_config(tmp_path, *words).flat()) for words in ((), ("trainer.attention=eager",)))
    assert usual != eager and usual == identity(small_config(tmp_path, "trainer.attention=null").flat())

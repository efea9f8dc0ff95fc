"""vLLM as the writer: what it is asked, what becomes of its answers, and that weights it did not take are noticed.

Where vLLM itself is installed, the tests that need no new weights are of vLLM; its CPU build takes none.
"""

import importlib.util
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import transformers

from kd.data.batches import IGNORE
from kd.models.causal_lm import CausalLM
from kd.objective.chunked import log_probabilities
from kd.rollout import vllm
from kd.rollout.generate import sample
from kd.rollout.samplers import Samplers
from tests.cases import option
from tests.refusals import refused
from tests.rollout.test_generate import END, PROMPTS, T, V, batch, seeds

INSTALLED = importlib.util.find_spec("vllm") is not None


class Stub:
    """Stand-in for vllm.LLM, as far as Engine uses it: greedy, row by row, with weights from a folder."""

    def __init__(self, folder: str, **options):
        assert options["max_model_len"] in (T, T + 1) and options["dtype"] in ("float32", "bfloat16")
        self.folder = folder
        self.load()

    def load(self) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, use_safetensors=True).eval()

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        self.load()

    @torch.no_grad()
    def generate(self, prompts: list[dict], requests: list, use_tqdm: bool) -> list:
        answers = []
        for prompt, request in zip(prompts, requests, strict=True):
            tokens, chances = list(prompt["prompt_token_ids"]), []
            size = len(tokens)
            while len(tokens) - size < request.max_tokens and tokens[size:][-1:] != request.stop_token_ids:
                logits = self.model(torch.tensor([tokens])).logits[0, -1]
                logp = logits.log_softmax(-1)
                for token, bias in (request.logit_bias or {}).items():
                    logits[token] += bias
                tokens.append(int(logits.argmax()))
                chances.append({tokens[-1]: SimpleNamespace(logprob=float(logp[tokens[-1]]))})
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens[size:], logprobs=chances)]))
        return answers


@pytest.fixture
def stub(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Stub, SimpleNamespace
    module.__spec__ = importlib.util.spec_from_loader("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


def model(seed: int, vocab: int = V, reads: int = 2048) -> CausalLM:
    """Return a model of a shape that vLLM computes on a CPU too."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    shape["max_position_embeddings"] = reads
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **shape))
    for parameter in causal.parameters():
        if parameter.ndim > 1:
            parameter.data *= 5
    return CausalLM(causal, vocab)


def same(ours, theirs) -> None:
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("vocab", [V, V - 20])
@pytest.mark.parametrize("max_tokens", [None, 3])
def test_what_it_writes_is_what_kd_writes(vocab, max_tokens, request):
    if not INSTALLED:
        request.getfixturevalue("stub")
    causal, given = model(0, vocab), batch(PROMPTS)
    given.labels[1] = IGNORE  # a row without a response stays as it is
    ours = vllm.Engine(causal, T, learns=False).write(given, END, seeds(6), temperature=0, max_tokens=max_tokens)
    theirs = sample(given, END, seeds(6), causal, temperature=0, max_tokens=max_tokens)
    same(ours, theirs)
    assert (
        not ours.token_info.by_student.any() and ours.token_info.student_logp is None and ours.row_ids is given.row_ids
    )


def test_a_model_that_reads_no_more_than_a_row_writes_all_but_its_last_token(request):
    if not INSTALLED:
        request.getfixturevalue("stub")
    causal, given = model(0, reads=T), batch(PROMPTS)
    ours = vllm.Engine(causal, T, learns=False).write(given, END, seeds(6), temperature=0)
    theirs = sample(given, END, seeds(6), causal, temperature=0)
    theirs.labels[:, -1] = IGNORE
    same(ours, theirs)


@pytest.mark.skipif(not INSTALLED, reason="needs vLLM")
def test_drawn_tokens_depend_on_the_row_and_its_seed_alone():
    causal, given = model(0), batch([4, 4, 4, 4])
    given = given._replace(ids=given.ids[:1].expand(4, -1).clone())
    writer = vllm.Engine(causal, T, learns=False)
    drawn = writer.write(given, END, torch.tensor([1, 2, 1, 2**62])).ids[:, 4:]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    alone = writer.write(given.split(1).__next__(), END, torch.tensor([1])).ids[:, 4:]
    assert torch.equal(alone[0], drawn[0])


def test_a_student_writes_with_the_weights_it_has(stub):
    causal, given = model(0), batch(PROMPTS)
    rollout = option("rollout", "student", share=1.0, temperature=0.0, engine="vllm")
    rollout = rollout(Samplers(causal, None, eos_token_id=END, seed=5))
    before = rollout(given, 0, 0.0)
    same(before, sample(given, END, seeds(6), causal, temperature=0))
    assert torch.equal(before.token_info.by_student, (before.labels != IGNORE).float())
    causal.load_state_dict(model(1).state_dict())
    after = rollout(given, 1, 0.0)
    same(after, sample(given, END, seeds(6), causal, temperature=0))
    assert not torch.equal(after.ids, before.ids) and rollout.samplers.engines.keys() == {"student"}


def test_weights_that_were_not_taken_are_noticed(stub, monkeypatch):
    monkeypatch.setattr(Stub, "collective_rpc", lambda self, method: None)
    causal, given = model(0), batch(PROMPTS)
    writer = vllm.Engine(causal, T, learns=True)
    writer.write(given, END, seeds(6), temperature=0)
    causal.load_state_dict(model(1).state_dict())
    with refused(option="rollout.engine", got="vllm", why="did not take the weights", hint="rollout.engine=kd"):
        writer.write(given, END, seeds(6), temperature=0)


def test_a_step_under_autocast_still_learns(stub, monkeypatch):
    monkeypatch.setattr(vllm, "OFF", 10.0)  # the stub computes in float32
    causal, given, gradients = model(0).train(), batch(PROMPTS), []
    for before in (False, True):
        causal.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if before:
                vllm.Engine(causal, T, learns=True).write(given, END, seeds(6), temperature=0)
            log_probabilities(causal.head, causal.hidden_states(given.ids)).square().mean().backward()
        gradients.append({name: p.grad for name, p in causal.named_parameters()})
    assert all(grad is not None and torch.equal(grad, gradients[0][name]) for name, grad in gradients[1].items())
    assert causal.training


@pytest.mark.skipif(INSTALLED, reason="needs no vLLM")
def test_without_vllm_the_command_is_said():
    with refused(option="rollout.engine", got="vllm", hint="pip install 'kd[vllm]'"):
        option("rollout", "teacher", engine="vllm")(None)


def test_an_engine_has_a_name():
    with refused(option="rollout.engine", got="sglang", need="kd or vllm"):
        option("rollout", "teacher", engine="sglang")(None)

"""Pruned models: with all parts they are the teacher, bit for bit; else each weight is the one of the parts named."""

import pytest
import torch
import transformers

from kd.models import importance, prune
from kd.models.importance import Rows
from kd.models.prune import Widths
from tests.refusals import refused

V, T, L, D, F, HEADS, GROUPS = 90, 24, 4, 32, 48, 4, 2
SHAPE = dict(
    vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=HEADS, max_position_embeddings=64,
    pad_token_id=None, eos_token_id=0, bos_token_id=0,
)  # fmt: skip
GATED = SHAPE | dict(intermediate_size=F, num_key_value_heads=GROUPS)
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
CONFIGS = {
    "llama": transformers.LlamaConfig(**GATED),
    "llama-biased": transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=16),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=4, layer_types=MIXED),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=4, layer_types=MIXED),
    "mistral": transformers.MistralConfig(**GATED, head_dim=16, sliding_window=4),
    "gpt2": transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=HEADS, n_positions=64),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE, intermediate_size=F),
    "phi": transformers.PhiConfig(**GATED),
    "phi-normed": transformers.PhiConfig(**GATED, qk_layernorm=True),
    "phi3": transformers.Phi3Config(**GATED),
    "olmo": transformers.OlmoConfig(**GATED),
    "olmo2": transformers.Olmo2Config(**GATED),
}  # fmt: skip
FFN_ALONE = ("gpt2", "gpt_neox", "phi-normed")
every_model = pytest.mark.parametrize("name", CONFIGS)
IDS = torch.arange(2 * T).view(2, T) * 7 % V
WHOLE = torch.ones(2, T, dtype=torch.bool)


def model_of(name: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():  # also biases and norms, which begin with one value
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model


WHOLE_WIDTH = Widths()


def pruned(model, layers: list[int], widths: Widths = WHOLE_WIDTH, measured: prune.Importance | None = None):
    config = prune.pruned_config(model.config, layers, widths)
    return prune.pruned_model(model, prune.choose_parts(layers, widths, measured), config).eval()


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# Which layers


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]), (12, 1, [11]), (32, 2, [0, 31]), (5, 5, [0, 1, 2, 3, 4]), (6, 3, [0, 2, 5]),
        (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
    ],
)  # fmt: skip
def test_uniform_layers_are_those_of_distilbert(total, count, expected):
    assert prune.choose_layers(total, count, "uniform") == expected


def test_every_layer_is_the_first_of_its_part():
    assert prune.choose_layers(12, 6, "every") == [0, 2, 4, 6, 8, 10]
    assert prune.choose_layers(7, 3, "every") == [0, 2, 4]


def test_layers_of_low_influence_are_left_out():
    assert prune.choose_layers(5, 3, "influence", [0.3, 0.1, 0.2, 0.1, 0.9]) == [0, 2, 4]
    assert prune.choose_layers(4, 2, "influence", [0.5, 0.5, 0.5, 0.5]) == [0, 1]


@pytest.mark.parametrize("keep", ["uniform", "every", "influence"])
def test_any_number_of_layers_is_chosen_once_and_in_order(keep):
    for total in range(1, 14):
        scores = torch.rand(total, generator=torch.Generator().manual_seed(total)).tolist()
        for count in range(1, total + 1):
            layers = prune.choose_layers(total, count, keep, scores)
            assert layers == sorted(set(layers)) and len(layers) == count and set(layers) <= set(range(total))


@pytest.mark.parametrize("layers", [5, [0, 4], [1, 0], [0, 0], [], [-1, 2], [0.0, 1.0]])
def test_layers_that_do_not_exist_are_refused(layers):
    with refused(option="start.layers", got=layers):
        prune.check_layers(4, layers)
    prune.check_layers(4, 4)
    prune.check_layers(4, [0, 3])


# Importance


def test_influence_of_a_block_by_hand():
    """Cosines are 1 / sqrt 2 and 1."""
    one = importance.BlockInfluence()
    before, after = torch.tensor([[[1.0, 0], [0, 1], [9, 9]]]), torch.tensor([[[1.0, 1], [0, 2], [-9, 9]]])
    one.add(before, after, torch.tensor([[True, True, False]]))
    assert one.result() == pytest.approx(0.14644661, abs=1e-7)


def test_scores_of_channels_by_hand():
    """Means of |a| are (3, 1) and (4, 1), in two sequences of which one is padded."""
    scores = importance.ActivationScores()
    scores.add(torch.tensor([[[2.0, -1], [-4, 1]]]), torch.tensor([[True, True]]))
    scores.add(torch.tensor([[[-4.0, 1], [99, 99]]]), torch.tensor([[True, False]]))
    assert scores.result().tolist() == pytest.approx([5.0, 2**0.5])
    assert prune.highest(scores.result(), 1).tolist() == [0]
    assert prune.highest(torch.tensor([1.0, 3, 3, 3]), 2).tolist() == [1, 2]


@every_model
def test_importance_has_the_shape_of_the_model_and_does_not_depend_on_padding_or_batches(name):
    model = model_of(name)
    neurons, groups = (4 * D, HEADS) if name == "gpt2" else (F, HEADS if name == "gpt_neox" else GROUPS)
    measured = importance.measure(model, [Rows(IDS, WHOLE)])
    assert [x.shape for x in measured] == [(L,), (L, neurons), (L, groups), (D,)]
    assert all((scores > 0).all() for scores in measured)
    padded = torch.cat([IDS, torch.full((2, 5), 3)], 1)
    mask = torch.arange(T + 5) < torch.tensor([[T], [T]])
    for again in (
        importance.measure(model, [Rows(padded, mask)]),
        importance.measure(model, [Rows(IDS[:1], WHOLE[:1]), Rows(IDS[1:], WHOLE[1:])]),
    ):
        for a, b in zip(measured, again):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Models


@every_model
def test_model_with_all_parts_has_the_logits_of_the_teacher_bit_for_bit(name):
    model = model_of(name)
    widths = Widths(ffn=prune.ffn_size(model.config))
    if name not in FFN_ALONE:
        widths = Widths(F, GROUPS, D if "hidden" in prune.family_of(model.config).widths else None)
    measured = importance.measure(model, [Rows(IDS, WHOLE)])
    assert torch.equal(logits(model), logits(pruned(model, list(range(L)), widths, measured)))


@every_model
def test_layers_keep_their_weights_and_their_kind_of_attention(name, tmp_path):
    """The model is saved, and read from its folder: the config says all that is needed."""
    model, layers = model_of(name), [1, 3]
    pruned(model, layers).save_pretrained(tmp_path)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    stack = prune.family_of(model.config).layers
    for new, old in enumerate(layers):
        a, b = small.get_submodule(f"{stack}.{new}"), model.get_submodule(f"{stack}.{old}")
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(weight, b.state_dict()[key]) for key, weight in a.state_dict().items())
        indices = [module.layer_idx for module in a.modules() if hasattr(module, "layer_idx")]
        assert indices and set(indices) == {new}
    if kinds := getattr(model.config, "layer_types", None):
        assert small.config.layer_types == [kinds[i] for i in layers]
    assert torch.equal(logits(small), without(model, stack, layers))
    tied = model.config.tie_word_embeddings
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied


def without(model, stack: str, layers: list[int]) -> torch.Tensor:
    """Return the logits of a model whose other layers give back what they get."""
    handles = []
    for i, layer in enumerate(model.get_submodule(stack)):
        if i not in layers:
            handles.append(layer.register_forward_hook(
                lambda module, inputs, given, output: (inputs[0],) if isinstance(output, tuple) else inputs[0],
                with_kwargs=True,
            ))  # fmt: skip
    answer = logits(model)
    for handle in handles:
        handle.remove()
    return answer


@every_model
def test_neurons_and_heads_that_do_nothing_are_cut_without_a_change(name):
    """Outputs of the parts that go are zero, so that the logits stay those of the teacher."""
    model = model_of(name)
    family, config = prune.family_of(model.config), model.config
    ffn, groups = prune.ffn_size(config), prune.kv_heads(config)
    cut_heads = "kv_heads" in family.widths
    with torch.no_grad():
        for layer in model.get_submodule(family.layers):
            columns = layer.get_submodule(family.ffn_output).weight
            columns = columns.T if name == "gpt2" else columns  # [D, F]
            columns[:, ::2] = 0
            if cut_heads:
                width = HEADS // groups * prune.head_dim(config)
                layer.get_submodule(family.attention_output).weight[:, :width] = 0
    neurons, group = torch.arange(ffn)[1::2], torch.tensor([1])
    widths = Widths(ffn=len(neurons), kv_heads=1 if cut_heads else None)
    parts = prune.Parts(list(range(L)), [neurons] * L, [group] * L if cut_heads else None)
    small = prune.pruned_model(model, parts, prune.pruned_config(config, parts.layers, widths)).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    if name != "olmo2":  # which normalises all heads of a layer together
        torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "hidden" in prune.family_of(CONFIGS[name]).widths])
def test_channels_are_cut_in_all_weights(name, tmp_path):
    """A channel that is zero at its source is cut. Norms then divide by the root of fewer channels."""
    model, channels = model_of(name), torch.arange(0, D, 2)
    small = prune.pruned_model(
        model, prune.Parts(list(range(L)), hidden=channels),
        prune.pruned_config(model.config, range(L), Widths(hidden=len(channels))),
    ).eval()  # fmt: skip
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hidden_size == D // 2 and prune.head_dim(again.config) == prune.head_dim(model.config)
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight[:, channels])
    assert torch.equal(small.get_output_embeddings().weight, model.get_output_embeddings().weight[:, channels])
    attention = prune.family_of(model.config).attention_output
    ours, theirs = (m.get_submodule("model.layers")[0].get_submodule(attention) for m in (small, model))
    assert torch.equal(ours.weight, theirs.weight[channels])
    assert torch.equal(logits(again.eval()), logits(small)) and logits(small).isfinite().all()


def test_fused_projections_of_phi3_are_cut_like_separate_ones():
    model = model_of("phi3")
    parts = prune.Parts([0], [torch.tensor([1, 5])], [torch.tensor([1])])
    small = prune.pruned_model(model, parts, prune.pruned_config(model.config, [0], Widths(2, 1)))
    whole, cut = (m.model.layers[0] for m in (model, small))
    gate, up = whole.mlp.gate_up_proj.weight.chunk(2)
    assert torch.equal(cut.mlp.gate_up_proj.weight, torch.cat([gate[[1, 5]], up[[1, 5]]]))
    q, k, v = whole.self_attn.qkv_proj.weight.split([32, 16, 16])
    assert torch.equal(cut.self_attn.qkv_proj.weight, torch.cat([q[16:], k[8:], v[8:]]))


# Refusals


@pytest.mark.parametrize(
    ("name", "widths", "option"),
    [
        ("gpt2", Widths(hidden=16), "start.hidden"), ("gpt2", Widths(kv_heads=2), "start.kv_heads"),
        ("gpt_neox", Widths(hidden=16), "start.hidden"), ("gpt_neox", Widths(kv_heads=2), "start.kv_heads"),
        ("phi-normed", Widths(hidden=16), "start.hidden"), ("phi-normed", Widths(kv_heads=1), "start.kv_heads"),
        ("gemma2", Widths(hidden=16), "start.hidden"), ("gemma3", Widths(hidden=16), "start.hidden"),
        ("llama", Widths(ffn=F + 1), "start.ffn"), ("llama", Widths(kv_heads=3), "start.kv_heads"),
        ("llama", Widths(hidden=D + 4), "start.hidden"), ("llama", Widths(hidden=30), "start.hidden"),
    ],
)  # fmt: skip
def test_width_that_cannot_be_is_refused(name, widths, option):
    with refused(option=option):
        prune.pruned_config(CONFIGS[name], range(L), widths)


def test_other_architectures_are_refused_by_name():
    with refused(option="start", got="teacher") as error:
        prune.family_of(transformers.OPTConfig())
    assert "opt" in error.value.why
    with refused(option="start"):
        prune.family_of(transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True))

"""A size or a name -> Hugging Face causal LM, seen as body and head.

Everything else sees a model through `Causal`: ids -> hidden states [B, T, D], and a head that maps hidden states to
logits over the vocabulary that teacher and student share.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from kd.corpora import offline_unless_reachable
from kd.errors import UserError, first_line
from kd.hardware import out_of_memory
from kd.sizes import SIZES


class Head(nn.Module):
    """Hidden states [n, D] -> logits [n, V], with the soft cap or scale that some models put behind their output layer.

    Padding rows beyond the tokenizer's `vocab` are cut off, so that teacher and student speak of the same tokens.
    """

    def __init__(self, output: nn.Module, vocab: int, softcap: float | None = None, scale: float = 1.0):
        super().__init__()
        self.output, self.vocab, self.softcap, self.scale = output, vocab, softcap, scale

    @classmethod
    def of(cls, model, vocab: int) -> Head:
        """The head of a Hugging Face causal LM."""
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies, Granite divides
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return cls(model.get_output_embeddings(), vocab, softcap, scale)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.output(hidden)[..., : self.vocab]
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Causal(nn.Module):
    """A Hugging Face causal LM as body and head."""

    def __init__(self, model, vocab: int):
        super().__init__()
        self.model = model
        # The head shares the model's output layer; out of the module tree, so that its weights are counted once.
        self.__dict__["head"] = Head.of(model, vocab)

    def hidden(self, ids: Tensor, **cache) -> Tensor:
        """ids [B, T] -> last hidden states [B, T, D]. cache: what is to be said of tokens that were read before."""
        return self.model.base_model(input_ids=ids, **{"use_cache": False} | cache).last_hidden_state

    def compile_layers(self) -> None:
        """Compile each layer by itself: they are alike, so one is compiled, where a whole body takes a minute."""
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.compile()

    def check(self, option: str) -> None:
        """Raise UserError unless head(hidden(x)) is what the model itself says, so that no scale or cap is missed."""
        device = next(self.model.parameters()).device
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 16
        ids = torch.arange(min(16, positions), device=device)[None] % self.head.vocab
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                whole = self.model(input_ids=ids, use_cache=False).logits[..., : self.head.vocab].float()
                ours = self.head(self.hidden(ids)).float()
        except Exception as error:  # models differ in what they take and return
            if out_of_memory(error):
                raise
            raise UserError(
                f"{option}: {type(self.model).__name__} could not be run as a body and an output layer "
                f"({type(error).__name__}: {first_line(error)}). Choose another model."
            ) from error
        self.model.train(training)
        tolerance = 1e-4 if whole.dtype == next(self.model.parameters()).dtype else 0.05
        off = ((whole - ours).abs().max() / whole.abs().max().clamp(min=1)).item()
        if off > tolerance:
            raise UserError(
                f"{option}: the output layer of {type(self.model).__name__} applied to its hidden states is off from "
                f"the model's own logits by {off:.1%}, so it does something there that kd does not know. "
                "Choose another model, or add it to Head in kd/models.py."
            )


class Cost(NamedTuple):
    """Size of a model, and its forward FLOPs per token."""

    parameters: int
    non_embedding: int
    flops_per_token: float
    output: int = 0  # parameters of the output layer
    active_parameters: int | None = None  # that a token uses, fewer in a mixture of experts; None: not known


class Flops(NamedTuple):
    """Per token: a training step of the student (forward and backward), and what it asks of the teacher."""

    student: float
    teacher: float


def step_flops(source: str, routes: bool, student: Cost, teacher: Cost | None) -> Flops:
    """FLOPs per token of a training step whose logits come from `source`; routes: some tokens are not distilled."""
    asked = 0.0
    if source == "online":
        asked = teacher.flops_per_token + (2 * teacher.output if routes else 0)  # its output layer is asked twice
    elif source == "cotrained":
        asked = teacher.flops_per_token * (4 if routes else 3)  # one that learns runs anew
    return Flops(3 * student.flops_per_token, asked)


def cost(model, seq_len: int) -> Cost:
    """Parameters and forward FLOPs per token: 2 per weight of every matrix, and 4 T D per layer for attention.

    Kaplan et al. 2020, arXiv 2001.08361, section 2.1, with the output layer counted; attention is over T/2 on average.
    Of a mixture of experts, FLOPs are those of the experts that a token is sent to. The scan of a state-space layer is
    not counted.
    """
    config = model.config.get_text_config()
    output = model.get_output_embeddings().weight
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # of tokens and positions
    total = sum(p.numel() for p in model.parameters())
    inner = total - sum(w.numel() for w in embeddings | {output})
    idle = sum(round(p.numel() * (1 - share)) for module, share in experts(model) for p in module.parameters())
    heads = getattr(config, "num_attention_heads", None) or 0  # none in a state-space model
    head = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    key, value = getattr(config, "qk_head_dim", None) or head, getattr(config, "v_head_dim", None) or head  # DeepSeek
    attention = 2 * attention_layers(config) * heads * (key + value) * seq_len / 2
    return Cost(total, inner, 2 * (inner - idle + output.numel()) + attention, output.numel(), total - idle)


# How configs call the number of experts, and how many of them a token is sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k", "top_k",
)  # fmt: skip


def experts(model) -> Iterator[tuple[nn.Module, float]]:
    """Modules that hold the routed experts of a layer, and the share of them that a token is sent to."""
    config, inside = model.config.get_text_config(), ()
    for name, module in model.named_modules():
        path, _, own = name.rpartition(".")
        routed = own == "experts" or (type(module).__name__.endswith("Experts") and "shared" not in own)
        if not routed or name.startswith(inside):
            continue
        inside = (*inside, f"{name}.")  # modules within belong to it
        parent = model.get_submodule(path)
        places = (module, parent, *parent.children(), config, getattr(config, "ffn_config", None))
        count = _first_number(places, EXPERTS)
        chosen = _first_number((config, getattr(config, "ffn_config", None), *places), EXPERTS_PER_TOKEN)
        if not count or not chosen:
            raise UserError(
                f"{type(model).__name__} has experts in {name}, and its config does not say as one that kd knows how "
                "many there are and how many of them a token uses. Choose another model, or add the names to EXPERTS "
                "and EXPERTS_PER_TOKEN in kd/models.py."
            )
        yield module, min(1.0, chosen / count)


def _first_number(places: Iterable, names: Iterable[str]) -> float | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, list) and value:  # one for each layer
                value = sum(value) / len(value)
            if type(value) in (int, float):
                return value
    return None


def attention_layers(config) -> int:
    """How many layers have attention over all earlier tokens."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return config.num_hidden_layers
    other = ("mamba", "linear", "conv", "recurrent", "moe", "mlp")
    return sum(not any(word in kind for word in other) for kind in kinds)


def cost_of(size: str | None, name: str | None, vocab: int, seq_len: int, option: str) -> Cost:
    """The cost of a model of build(), from its shape alone: no weights are made or read."""
    with torch.device("meta"):
        if size:
            return cost(from_size(size, vocab, seq_len), seq_len)
        base = adapter_base(name, option)
        config = config_of(base, f"{option}={name} {BASE}") if base else config_of(name, option)
        model = from_hub(_FromConfig, name, f"{option}={name}", config=config)
        return cost(model, seq_len)


def build(size: str | None, name: str | None, vocab: int, seq_len: int, option: str) -> Causal:
    """A model of a size of kd/sizes.py with fresh weights, or the one of that Hub name or folder, float32."""
    model = from_size(size, vocab, seq_len) if size else pretrained(name, option)
    width = model.get_output_embeddings().weight.shape[0]
    if width < vocab:
        raise UserError(
            f"{option}: the model knows {width:,} tokens and the tokenizer {vocab:,}. They do not belong together; "
            "leave data.tokenizer out, so that the model's own is used."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or seq_len
    if positions < seq_len:
        raise UserError(f"{option}: reads at most {positions:,} tokens at once; type data.seq_len={positions} or less.")
    causal = Causal(model, vocab)
    causal.check(option)
    return causal


def from_size(size: str, vocab: int, seq_len: int):
    """A Llama-style model from scratch, from the row `size` of kd/sizes.py.

    Weights begin with a variance of 1 / width, as in muP (Yang et al. 2022, arXiv 2203.03466). The usual deviation of
    0.02 is that of a width of 2,500; at 96 it costs 0.4 nats after 300,000 tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    row = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=row.hidden,
        intermediate_size=row.ffn,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        max_position_embeddings=seq_len,
        tie_word_embeddings=row.tied,
        initializer_range=row.hidden**-0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def pretrained(name: str, option: str):
    """The causal LM of that Hub name or folder, float32, from safetensors and without running its code.

    Without dropout, so that what it says in training is what it said when it wrote, as MiniLLM's ratio has it. An
    adapter of PEFT, such as LoRA, is merged into the model that it was trained on.
    """
    from transformers import AutoModelForCausalLM

    if base := adapter_base(name, option):
        return with_adapter(pretrained(base, f"{option}={name} {BASE}"), name, option)
    config = config_of(name, option)
    for part in (config, config.get_text_config()):
        for key in [k for k, v in vars(part).items() if "drop" in k and type(v) is float]:
            setattr(part, key, 0.0)
        if getattr(part, "rescale_every", None):  # RWKV halves weights in place whenever it is in eval mode
            part.rescale_every = 0
    settings = dict(config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    model, info = from_hub(AutoModelForCausalLM, name, f"{option}={name}", **settings)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{option}={name}: its files lack {len(missing)} weights, {', '.join(missing[:3])} among them, "
            "which would be left random. Download it again, or choose another."
        )
    return model


def config_of(name: str, option: str):
    """The config of that Hub name or folder; raises UserError where it asks for code, or for quantised weights."""
    from transformers import AutoConfig

    from_hub(_Harmless, name, f"{option}={name}")
    config = from_hub(AutoConfig, name, f"{option}={name}")
    for part in (config, config.get_text_config()):
        quantisation = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
            method = getattr(method, "value", method)
            if not method and isinstance(quantisation, dict) and {"load_in_4bit", "load_in_8bit"} & quantisation.keys():
                method = "bitsandbytes"  # whose older files do not name it
            refused = (
                f"{option}={name}: its weights are quantised ({method or 'unknown method'}), and kd needs those in "
                "floating point. Give the model that it was quantised from, which its model card names"
            )
            if not str(method).startswith("bitsandbytes"):  # transformers cannot turn the weights of others back
                raise UserError(f"{refused}.")
            raise UserError(
                f"{refused}; or, with the package bitsandbytes and a place for the new folder, type:\n"
                "  python -c 'import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
                "name, new = sys.argv[1:]; M.from_pretrained(name).dequantize().save_pretrained(new); "
                f"T.from_pretrained(name).save_pretrained(new)' {shlex.quote(name)} NEW_FOLDER"
            )
    return config


ADAPTER, BASE = "adapter_config.json", "base_model_name_or_path"


def adapter_base(name: str, option: str) -> str | None:
    """The model that an adapter of PEFT was trained on, by its Hub name or folder; None for a whole model."""
    path = from_hub(_File, name, f"{option}={name}", file=ADAPTER)
    if path is None:
        return None
    if from_hub(_File, name, f"{option}={name}", file="config.json") is not None:
        raise UserError(
            f"{option}={name}: holds a whole model (config.json) and an adapter ({ADAPTER}), and only one of them can "
            "be meant. Keep the adapter in a folder of its own, or remove it where it is merged into the model already."
        )
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8")).get(BASE)
    except (ValueError, AttributeError):
        base = None
    if not base or not isinstance(base, str):
        raise UserError(
            f"{option}={name}: its {ADAPTER} does not name the model that it belongs to. Type that model's name or "
            f"folder there, as {BASE}."
        )
    return base


def with_adapter(model, name: str, option: str):
    """The model with the adapter of that Hub name or folder merged into its weights; raises UserError without PEFT."""
    if from_hub(_File, name, f"{option}={name}", file="adapter_model.safetensors") is None:
        raise UserError(
            f"{option}={name}: an adapter needs its weights in adapter_model.safetensors, and has no such file."
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(
            f"{option}={name}: this is an adapter, and merging it into its model needs PEFT. Type "
            "pip install 'kd[peft]', or give a folder where it is merged."
        ) from error

    class Merged:
        @staticmethod
        def from_pretrained(name: str, trust_remote_code: bool):
            adapted = PeftModel.from_pretrained(model, name)
            if not hasattr(adapted.base_model, "merge_and_unload"):
                raise ValueError(
                    f"{adapted.active_peft_config.peft_type.value} changes no weights, so it cannot be merged"
                )
            return adapted.merge_and_unload(safe_merge=True)

    return from_hub(Merged, name, f"{option}={name}").requires_grad_(True)


class _FromConfig:
    @staticmethod
    def from_pretrained(name: str, config, **settings):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, **settings)


class _File:
    @staticmethod
    def from_pretrained(name: str, file: str, **settings) -> str | None:
        """Where a file of a folder or of the Hub is on this machine; None if there is none of that name."""
        from transformers.utils import cached_file

        how = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        return cached_file(name, file, **how)


class _Harmless:
    """Reads a model's config.json, and refuses one that asks for kernels of the Hub, which are code."""

    @staticmethod
    def from_pretrained(name: str, **settings) -> None:
        from transformers import PretrainedConfig

        def check(node) -> None:
            for key, value in node.items() if isinstance(node, dict) else ():
                if "implementation" in key and "/" in str(value):
                    raise ValueError(f"its config.json asks for code of the Hub, {key}={value}, which kd runs none of.")
                check(value)

        check(PretrainedConfig.get_config_dict(name)[0])


def from_hub(auto, name: str, what: str, **settings):
    """auto.from_pretrained(name), with an error that says what to do where there is no such thing."""
    folder = Path(name).is_dir()
    if not folder:
        offline_unless_reachable()
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **settings)
    except UserError:
        raise
    except Exception as error:  # of several libraries, and of packages that they lack
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines[:1] and lines[0].endswith(":") else 1]) or type(error).__name__
        if not isinstance(error, OSError | ValueError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        where = "in that folder" if folder else "it is no folder here, and the Hub did not give it"
        raise UserError(
            f"{what} could not be loaded ({where}): {reason}\n"
            "Check the name and the network, or give the folder of a downloaded model."
        ) from error


def revision(name: str) -> str | None:
    """The commit of a Hub model whose files were last downloaded here; None if none were."""
    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def same_vocabulary(ours, theirs, option: str, by_ids: bool = False) -> None:
    """Raise UserError unless two tokenizers give every token the same id.

    by_ids: special and added tokens may have other names, if the ids are the same ones.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    if a == b:
        return
    by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in (a, b)]
    added = {index for of in (ours, theirs) for index in getattr(of, "added_tokens_decoder", {})}
    differ = sorted(index for index in by_id[0].keys() | by_id[1].keys() if by_id[0].get(index) != by_id[1].get(index))
    renamed = by_id[0].keys() == by_id[1].keys() and added.issuperset(differ)
    if by_ids and renamed:
        return
    count = sum(a.get(token) != index for token, index in b.items()) + len(a.keys() - b.keys())
    shown = [[repr(names[index]) if index in names else "no token" for names in by_id] for index in differ[:3]]
    examples = [f"{index:,} is {one} in the data's and {other} in its" for index, (one, other) in zip(differ, shown)]
    if renamed:
        advice = (
            "The ids are the same, and only special or added tokens have other names. If they mean the same, type "
            "token_names=any."
        )
    else:
        advice = (
            "Distillation compares the same ids on both sides, so all must share one tokenizer. Choose a teacher and a "
            "student of one family, or a size from scratch (student=200k), which takes the teacher's tokenizer."
        )
    raise UserError(
        f"{option}: its tokenizer has {len(b):,} tokens and the data's {len(a):,}; {count:,} of them differ "
        f"(id {'; id '.join(examples)}{'; …' if len(differ) > 3 else ''}). {advice}"
    )


def check_rows(tokenizer, name: str, option: str) -> None:
    """Raise UserError where the model of a Hub name or folder has no row for some tokens of its own tokenizer."""
    rows = config_of(adapter_base(name, option) or name, option).get_text_config().vocab_size
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if not beyond:
        return
    shown = ", ".join(f"{token} ({index:,})" for index, token in beyond[:5]) + (", …" if len(beyond) > 5 else "")
    raise UserError(
        f"{option}={name}: its tokenizer has {len(beyond):,} tokens beyond the {rows:,} that the model knows: {shown}. "
        f"The model needs a row for each. Type this once, and then {option}=NEW_FOLDER:\n"
        "  python -c 'import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "name, new = sys.argv[1:]; m, t = M.from_pretrained(name), T.from_pretrained(name); "
        "m.resize_token_embeddings(max(t.get_vocab().values()) + 1); m.save_pretrained(new); t.save_pretrained(new)' "
        f"{shlex.quote(name)} NEW_FOLDER"
    )

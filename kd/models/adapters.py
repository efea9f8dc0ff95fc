"""Adapters: few weights that learn beside a frozen model, by PEFT.

An adapter is a function that changes a student in place before its first step. merge() makes a plain model of it again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn

from kd.errors import UserError, check, first_line
from kd.models.causal_lm import CausalLM

WEIGHTS = (".lora_A.", ".lora_B.")  # in the names of the weights of an adapter
ALL_LINEAR = "all-linear"
EXPORTS = ("merged", "both")
OFF = 1e-3  # largest change of a logit by merging


def none(model: CausalLM | None) -> None:
    """All weights of the student learn."""


def lora(
    model: CausalLM | None, rank: int = 16, alpha: float = 32.0, targets: str | list[str] = ALL_LINEAR,
    rslora: bool = False, head: bool = False, export: str = "merged",
) -> None:  # fmt: skip
    """Low-rank updates alpha / rank * B A of frozen matrices. Only A and B learn; B begins as 0.

    Hu et al. 2021, arXiv 2106.09685. model: None only checks the settings. targets: all-linear, or names of modules.
    rslora: the factor is alpha / sqrt(rank), Kalajdzievski 2023, arXiv 2312.03732. head: also the output layer. export:
    merged, or both to keep the adapter alone too. Raises UserError for settings that the model cannot have.
    """
    check("adapter.rank", rank, rank >= 1, "a rank of at least 1, e.g. 16")
    check("adapter.alpha", alpha, alpha > 0, "a number above 0, e.g. twice the rank")
    check("adapter.export", export, export in EXPORTS, " or ".join(EXPORTS))
    peft = _peft()
    if model is None:
        return
    names = _matrices(model.model, targets, head)
    transposed = type(model.model.get_submodule(names[0])).__name__ == "Conv1D"  # of GPT-2
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, use_rslora=rslora, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM", fan_in_fan_out=transposed,
    )  # fmt: skip
    try:
        peft.inject_adapter_in_model(settings, model.model)
    except ValueError as error:  # a layer that PEFT does not know
        why, hint = f"PEFT refuses them: {first_line(error)}", "name other modules"
        raise UserError(option="adapter.targets", got=targets, why=why, hint=hint) from error
    model.head.output = model.model.get_output_embeddings()


def _peft():
    try:
        import peft
    except ImportError as error:
        hint = "type pip install 'kd[peft]', or adapter=none"
        raise UserError(option="adapter", got="lora", need="the package PEFT", hint=hint) from error
    return peft


def _matrices(model: nn.Module, targets: str | list[str], head: bool) -> list[str]:
    """Return the names of the modules that get an update."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    inner = [name for name, module in linear.items() if module is not output]
    names = inner if targets == ALL_LINEAR else []
    for word in [] if targets == ALL_LINEAR else [targets] if isinstance(targets, str) else targets:
        matching = [name for name in inner if f".{name}".endswith(f".{word}")]
        if not matching:
            leaves = sorted({name.rpartition(".")[2] for name in inner})
            raise UserError(
                option="adapter.targets",
                got=word,
                need=f"{ALL_LINEAR}, or names of matrices of {type(model).__name__}: {', '.join(leaves)}",
                hint="for the output layer, type adapter.head=true",
            )
        names += matching
    if head and output.weight is model.get_input_embeddings().weight:
        raise UserError(
            option="adapter.head",
            got=True,
            why="the output layer of this model is its embedding too, which an update of one of them would part",
            hint="leave adapter.head out",
        )
    names += [name for name, module in linear.items() if module is output and head]
    if not names:
        need = f"{ALL_LINEAR}, or names of modules"
        raise UserError(option="adapter.targets", got=targets, need=need, hint=f"type adapter.targets={ALL_LINEAR}")
    return list(dict.fromkeys(names))


def is_adapted(model: CausalLM) -> bool:
    """Return True if the model has an adapter."""
    return hasattr(model.model, "peft_config")


def trainable(model: nn.Module) -> int:
    """Return the number of weights that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that do not learn, all names of those that are tied."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def frozen_digest(model: nn.Module) -> str | None:
    """Return the digest of the weights that do not learn; None if all learn."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    digest = xxhash.xxh3_128()
    for name, weight in frozen:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest() if frozen else None


def without_adapter(model: CausalLM) -> CausalLM:
    """Return a model without the adapter of the given one, on the same weights, so that they are in memory once."""
    weights: Iterable[Tensor] = (*model.model.parameters(), *model.model.buffers())
    base = copy.deepcopy(model.model, {id(weight): weight for weight in weights})
    _unwrap(base)
    return CausalLM(base, model.head.vocab)


def share_weights(one: CausalLM | None, other: CausalLM | None) -> bool:
    """Return True if two models have weights in common."""
    return bool(one and other and {*map(id, one.parameters())} & {*map(id, other.parameters())})


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers of an adapter with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _unwrap(model: nn.Module) -> None:
    """Put the frozen layers in the place of those of the adapter."""
    for name, layer in _layers(model):
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


@torch.no_grad()
def merge(model: CausalLM) -> None:
    """Add an adapter to the weights of its model, in place. Raises UserError if that changes a logit by more than OFF.

    A model without an adapter stays as it is.
    """
    if not is_adapted(model):
        return
    before = _logits(model.eval())
    for _, layer in _layers(model.model):
        layer.merge(safe_merge=True)
    _unwrap(model.model)
    model.head.output = model.model.get_output_embeddings()
    off = (_logits(model) - before).abs().max().item()
    if not off <= OFF:
        raise UserError(
            option="adapter",
            got="lora",
            why=f"merging the adapter into the student changes a logit by {off:.2g}",
            need=f"a change of at most {OFF}, which rounding explains",
            hint="choose a lower lr.peak or adapter.alpha",
        )


def _logits(model: CausalLM) -> Tensor:
    """Return the logits of a text that has each of 16 tokens."""
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or 16
    device = next(model.parameters()).device
    ids = torch.arange(min(16, positions), device=device)[None] % model.head.vocab
    with torch.compiler.set_stance("force_eager"):  # code compiled for the layers of the adapter is of no use any more
        return model.head(model.hidden_states(ids)).float()


def save(model: CausalLM, folder: Path, base: str | None) -> None:
    """Write the adapter alone in the format of PEFT. base: folder or Hub name of the frozen model."""
    settings = copy.copy(model.model.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.save_pretrained(folder)
    weights = _peft().get_peft_model_state_dict(model.model, save_embedding_layers=False)
    named = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})

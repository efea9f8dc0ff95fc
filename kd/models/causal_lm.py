"""Hugging Face causal LMs as body and head, built from a size or a name.

All other code uses a model through `CausalLM`: ids -> hidden states [B, T, D], and a head that maps hidden states to
logits over the vocabulary that teacher and student share.
"""

from __future__ import annotations

import shlex

import torch
from torch import Tensor, nn

from kd.config.sizes import SIZES
from kd.errors import UserError, first_line
from kd.models.hub import adapter_base, config_of, pretrained
from kd.system.compilation import compile_if_possible
from kd.system.hardware import out_of_memory


class Head(nn.Module):
    """Output layer: hidden states [n, D] -> logits [n, V], with the soft cap or scale that some models apply after it.

    Padding rows beyond the tokenizer's `vocab` are cut off, so that teacher and student have the same columns.
    """

    def __init__(self, output: nn.Module, vocab: int, softcap: float | None = None, scale: float = 1.0):
        super().__init__()
        self.output, self.vocab, self.softcap, self.scale = output, vocab, softcap, scale

    @classmethod
    def from_model(cls, model, vocab: int) -> Head:
        """Return the head of a Hugging Face causal LM."""
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies, Granite divides
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return cls(model.get_output_embeddings(), vocab, softcap, scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.adjusted(self.output(hidden)[..., : self.vocab])

    def adjusted(self, logits: Tensor) -> Tensor:
        """Return what the model makes of the products with its output layer [n, V]."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class CausalLM(nn.Module):
    """A Hugging Face causal LM as body and head."""

    def __init__(self, model, vocab: int):
        super().__init__()
        self.model = model
        self.held_in: str | None = None  # dtype of the weights of a frozen model, see kd.models.weights
        # The head shares the model's output layer; out of the module tree, so that its weights are counted once.
        self.__dict__["head"] = Head.from_model(model, vocab)

    def hidden_states(self, ids: Tensor, positions: Tensor | None = None, **cache) -> Tensor:
        """Return the last hidden states [B, T, D] of ids [B, T]. cache: arguments about earlier tokens.

        positions [B, T]: places of tokens in their documents. Where they restart, transformers builds a mask, so that
        no document sees another (transformers.masking_utils). check_isolation() refuses models without such a mask.
        """
        if positions is not None:
            cache["position_ids"] = positions
        return self.model.base_model(input_ids=ids, **{"use_cache": False} | cache).last_hidden_state

    def compile_layers(self, required: bool = True) -> None:
        """Compile each layer by itself. Layers are alike, so torch compiles one; a whole body would take a minute.

        required: False to compute without torch.compile if that fails.
        """
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    if required:
                        layer.compile()
                    else:
                        layer._compiled_call_impl = compile_if_possible(layer._call_impl)

    def checkpoint_layers(self) -> None:
        """Keep only the inputs of each layer for the backward pass, which computes the layer once more.

        Chen et al. 2016, arXiv 1604.06174. Gradients do not change. In eval mode the layers are as before, and may
        use a cache. Raises UserError for a model without such layers.
        """
        model = self.model
        # Its former name is deprecated in newer versions of transformers.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                option="trainer.gradient_checkpointing",
                got=True,
                why=f"{type(model).__name__} has no layers that can be computed again",
                hint="leave trainer.gradient_checkpointing out, and type a smaller trainer.micro_batch",
            ) from error

    def set_attention(self, implementation: str) -> None:
        """Compute attention by eager, sdpa or flash_attention_2 of transformers, from now on.

        Raises UserError where this machine or this model cannot.
        """
        from transformers.utils import is_flash_attn_2_available

        refused = UserError(option="trainer.attention", got=implementation)
        # Without that package transformers would load a kernel of the Hub, which is code.
        flash = implementation == "flash_attention_2"
        if flash and not is_flash_attn_2_available():
            hint = "type pip install flash-attn --no-build-isolation, or trainer.attention=sdpa"
            raise refused.replace(need="a GPU of NVIDIA and the package flash-attn", hint=hint)
        name, reason = type(self.model).__name__, "it computes attention in another way"
        kernels = getattr(self.model, "_compatible_flash_implementations", None)  # which may be of the Hub
        try:
            if not (flash and kernels and implementation not in kernels):
                self.model.set_attn_implementation(implementation)
        except (ValueError, ImportError) as error:
            reason = first_line(error)
        if self.model.config.get_text_config()._attn_implementation != implementation:
            hint = "leave trainer.attention out"
            raise refused.replace(why=f"does not fit {name}: {reason}", hint=hint)

    def check(self, option: str) -> None:
        """Raise UserError unless head(hidden_states(x)) equals the model's logits: no scale or cap may be missed."""
        device = next(self.model.parameters()).device
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 16
        ids = torch.arange(min(16, positions), device=device)[None] % self.head.vocab
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                whole = self.model(input_ids=ids, use_cache=False).logits[..., : self.head.vocab].float()
                ours = self.head(self.hidden_states(ids)).float()
        except Exception as error:  # models differ in what they take and return
            if out_of_memory(error):
                raise
            raise UserError(
                option=option,
                why=f"{type(self.model).__name__} could not be run as a body and an output layer "
                f"({type(error).__name__}: {first_line(error)})",
                hint="choose another model",
            ) from error
        self.model.train(training)
        tolerance = 1e-4 if whole.dtype == next(self.model.parameters()).dtype else 0.05
        off = ((whole - ours).abs().max() / whole.abs().max().clamp(min=1)).item()
        if off > tolerance:
            raise UserError(
                option=option,
                why=f"the output layer of {type(self.model).__name__} applied to its hidden states is off from the "
                f"model's own logits by {off:.1%}, so that the model does something there that kd does not know",
                hint="choose another model, or add this model to Head in kd/models/causal_lm.py",
            )

    @torch.no_grad()
    def check_isolation(self, option: str, setting: str = "data.isolate") -> None:
        """Raise UserError unless documents in one row give the logits that each gives alone.

        Models with a state that goes on (Mamba, RWKV) or distances in place of positions (ALiBi) do not. The error is
        compared with the effect of the other documents, so that it shows in untrained models, too. setting: needs it.
        """
        device, training = next(self.model.parameters()).device, self.model.training
        rows = [(3, 5), (5, 2, 1)]  # tokens of the documents in two rows that restart at other places
        ids = torch.arange(16, device=device).view(2, 8) * 7 % self.head.vocab
        positions = torch.tensor([[i for size in sizes for i in range(size)] for sizes in rows], device=device)
        kind, hint = type(self.model).__name__, f"leave {setting} out, or choose another model"
        self.model.eval()
        try:
            together, plain = (self.head(self.hidden_states(*x)).float() for x in ((ids, positions), (ids,)))
            alone = torch.stack([
                torch.cat([self.head(self.hidden_states(part[None]))[0].float() for part in row.split(sizes)])
                for row, sizes in zip(ids, rows, strict=True)
            ])  # fmt: skip
        except Exception as failure:
            if out_of_memory(failure):
                raise
            why = f"{kind} takes no positions of documents in a row ({type(failure).__name__}: {first_line(failure)})"
            raise UserError(option=option, conflict=f"{setting}=true", why=why, hint=hint) from failure
        finally:
            self.model.train(training)
        error, effect = (together - alone).abs().max(), (plain - alone).abs().max()
        if not error <= (0.01 * effect).clamp(min=1e-5 * alone.abs().max().item()):
            raise UserError(
                option=option,
                conflict=f"{setting}=true",
                why=f"{kind} does not keep the documents of a row apart: logits differ from those of a document alone "
                f"by {error:.2g}, where the other documents move them by {effect:.2g}",
                hint=hint,
            )


def build_model(size: str | None, name: str | None, vocab: int, seq_len: int, option: str) -> CausalLM:
    """Return a float32 model: of a size of kd/config/sizes.py with new weights, or of a Hub name or folder."""
    if size:
        model = from_size(size, vocab, seq_len)
    else:
        assert name, "a model without a size has a name"
        model = pretrained(name, option)
    width = model.get_output_embeddings().weight.shape[0]
    if width < vocab:
        raise UserError(
            option=option,
            why=f"the model knows {width:,} tokens and the tokenizer {vocab:,}, so that they do not belong together",
            hint="leave data.tokenizer out, so that the model's own tokenizer is used",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or seq_len
    if positions < seq_len:
        why, hint = f"reads at most {positions:,} tokens at once", f"type data.seq_len={positions} or less"
        raise UserError(option=option, why=why, hint=hint)
    causal = CausalLM(model, vocab)
    causal.check(option)
    return causal


def from_size(size: str, vocab: int, seq_len: int):
    """Return a Llama-style model with new weights, from the row `size` of kd/config/sizes.py.

    Initial weights have a variance of 1 / width, as in muP (Yang et al. 2022, arXiv 2203.03466). The usual standard
    deviation of 0.02 fits a width of 2,500; at a width of 96 it costs 0.4 nats after 300,000 tokens.
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


def check_same_vocabulary(ours, theirs, option: str, by_ids: bool = False) -> None:
    """Raise UserError unless two tokenizers give every token the same id.

    by_ids: special and added tokens may have other names if their ids are equal.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    if a == b:
        return
    by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in (a, b)]
    added = {index for tokenizer in (ours, theirs) for index in getattr(tokenizer, "added_tokens_decoder", {})}
    differ = sorted(index for index in by_id[0].keys() | by_id[1].keys() if by_id[0].get(index) != by_id[1].get(index))
    renamed = by_id[0].keys() == by_id[1].keys() and added.issuperset(differ)
    if by_ids and renamed:
        return
    count = sum(a.get(token) != index for token, index in b.items()) + len(a.keys() - b.keys())
    shown = [[repr(names[index]) if index in names else "no token" for names in by_id] for index in differ[:3]]
    examples = [f"{index:,} is {one} in the data's and {other} in its" for index, (one, other) in zip(differ, shown)]
    if renamed:
        hint = (
            "if these tokens mean the same, type token_names=any: the ids are the same, and only special or added "
            "tokens have other names"
        )
    else:
        hint = (
            "choose a teacher and a student of one family, or a size from scratch (student=200k), which takes the "
            "teacher's tokenizer"
        )
    raise UserError(
        option=option,
        why=f"its tokenizer has {len(b):,} tokens and the data's {len(a):,}; {count:,} of them differ "
        f"(id {'; id '.join(examples)}{'; …' if len(differ) > 3 else ''})",
        need="one tokenizer for the data and all models, as distillation compares the same ids on both sides",
        hint=hint,
    )


def check_rows(tokenizer, name: str, option: str) -> None:
    """Raise UserError where the model of a Hub name or folder has no row for some tokens of its own tokenizer."""
    rows = config_of(adapter_base(name, option) or name, option).get_text_config().vocab_size
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if not beyond:
        return
    shown = ", ".join(f"{token} ({index:,})" for index, token in beyond[:5]) + (", …" if len(beyond) > 5 else "")
    command = (
        "python -c 'import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "name, new = sys.argv[1:]; m, t = M.from_pretrained(name), T.from_pretrained(name); "
        "m.resize_token_embeddings(max(t.get_vocab().values()) + 1); m.save_pretrained(new); t.save_pretrained(new)' "
        f"{shlex.quote(name)} NEW_FOLDER"
    )
    raise UserError(
        option=option,
        got=name,
        why=f"its tokenizer has {len(beyond):,} tokens beyond the {rows:,} that the model knows: {shown}",
        need="a row of the model for each token",
        hint=f"type this once, and then {option}=NEW_FOLDER",
        commands=[command],
    )

"""Tiny models of every architecture, a text, and tokenizers."""

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from kd.models import causal_lm

V, T = 90, 32
SHAPE = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GATED = SHAPE | dict(intermediate_size=48, num_key_value_heads=2)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
# The caps and scales are so strong that leaving one out shows.
CONFIGS = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "llama": transformers.LlamaConfig(**GATED),
    "llama-tied": transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**GATED),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=16),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=0.2),
    "cohere": transformers.CohereConfig(**GATED, logit_scale=0.25, eos_token_id=0),
    "granite": transformers.GraniteConfig(**GATED, logits_scaling=4.0),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
    "pythia": transformers.GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "phi": transformers.PhiConfig(**SHAPE, intermediate_size=48),
}
SPARSE = SHAPE | dict(num_key_value_heads=4)
FEW = dict(num_experts_per_tok=2, moe_intermediate_size=24)
MIXTURES = {  # each names its experts in another way; total and active are of 8 experts of which a token uses 2
    "mixtral": transformers.MixtralConfig(**GATED, num_local_experts=8, num_experts_per_tok=2),
    "qwen2_moe": transformers.Qwen2MoeConfig(**GATED, num_experts=8, **FEW, shared_expert_intermediate_size=16),
    "granite": transformers.GraniteMoeSharedConfig(
        **GATED, num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=16
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SPARSE, n_routed_experts=8, **FEW, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, intermediate_size=48,
    ),
    "ernie": transformers.Ernie4_5_MoeConfig(**GATED, moe_num_experts=8, moe_k=2, moe_intermediate_size=24),
    "hunyuan": transformers.HunYuanMoEV1Config(**GATED, num_experts=8, moe_topk=[2, 2], head_dim=8),
    "jetmoe": transformers.JetMoeConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=8, num_experts_per_tok=2,
    ),
}  # fmt: skip
NO_ATTENTION = {
    "mamba": transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": transformers.Mamba2Config(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1
    ),
    "rwkv": transformers.RwkvConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, rescale_every=1),
}
IDS = torch.arange(2 * T).view(2, T) * 7 % 80


def build(folder: Path | str, vocab: int = V, seq_len: int = T) -> causal_lm.CausalLM:
    return causal_lm.build_model(None, str(folder), vocab, seq_len, "teacher.name")


def text_and_tokenizer(folder: Path, vocab: dict[str, int] | None = None) -> tuple[Path, Path]:
    """A file of text, and a folder with a tokenizer of its words; vocab: more tokens."""
    words = [f"w{n}" for n in range(40)]
    ids = {word: n for n, word in enumerate(["<unk>", "</s>", *words])} | (vocab or {})
    fast = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(folder / "tok")
    lines = (" ".join(random.Random(n).choices(words, k=40)) for n in range(200))
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder / "text.txt", folder / "tok"


def words_as_tokens(*names: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({name: n for n, name in enumerate(names)})))
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast

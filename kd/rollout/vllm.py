"""Sampling with vLLM in place of kd/rollout/generate.py, for one model that draws from its own distribution.

Each row has its own seed here too. But vLLM's rounding depends on the rows that it computes together, so a resumed run
may write other tokens than an undisturbed one.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError, first_line
from kd.models.causal_lm import CausalLM
from kd.objective.token_info import TokenInfo
from kd.rollout.generate import eval_mode, prompts

SHARE = 0.3  # share of GPU memory for vLLM's weights and cache; training takes the rest
OFF = 0.1  # nats per token, largest mean difference of the two models; bfloat16 rounding causes some hundredths


class Engine:
    """Model in vLLM that writes rows of at most `length` + 1 tokens, prompt included, or as many as it can read.

    learns: True if the weights change, so that vLLM gets them again before each batch.
    """

    def __init__(self, model: CausalLM, length: int, learns: bool):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self.model, self.learns = model, learns
        self.folder = TemporaryDirectory(prefix="kd-vllm-")
        weight = next(model.parameters())
        device = weight.device.type
        half = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if half else weight.dtype
        # The last token of a row is never read, but vLLM counts it among those that a model can read.
        reads = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or length + 1
        self.most = min(length + 1, reads)
        self._save()
        try:
            self.llm = LLM(
                self.folder.name, skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."), seed=0,
                max_model_len=self.most, gpu_memory_utilization=SHARE, enable_prefix_caching=False,
                enforce_eager=device == "cpu", generation_config="vllm", disable_log_stats=True,
            )  # fmt: skip
        except Exception as error:  # vLLM raises errors of many kinds
            raise UserError(
                option="rollout.engine",
                got="vllm",
                why=f"vLLM could not load {type(model.model).__name__} ({type(error).__name__}: {first_line(error)})",
                hint="type rollout.engine=kd",
            ) from error

    def _save(self) -> None:
        self.model.model.save_pretrained(self.folder.name, safe_serialization=True)

    @torch.no_grad()
    def write(
        self, batch: Batch, end: int, seed: Tensor, temperature: float = 1.0, top_k: int | None = None,
        top_p: float = 1.0, max_tokens: int | None = None,
    ) -> Batch:  # fmt: skip
        """Return the batch with new responses, as kd.rollout.generate.sample does for one model.

        No probabilities of the tokens are known. Raises UserError if vLLM's model differs from ours, for example
        because it did not take all weights.
        """
        from vllm import SamplingParams

        if self.learns:
            self._save()
            self.llm.collective_rpc("reload_weights")
        prompt, tokens = (x.cpu() for x in prompts(batch, end))
        prompt, labels = prompt.tolist(), torch.full(batch.labels.shape, IGNORE)
        rows = [row for row, size in enumerate(prompt) if size < self.most]
        # Columns that pad the output layer are no tokens; kd.models.causal_lm.Head leaves them out.
        beyond = range(self.model.head.vocab, self.model.model.get_output_embeddings().weight.shape[0])
        shared = dict(temperature=temperature, top_k=top_k or 0, top_p=top_p, stop_token_ids=[end], ignore_eos=True,
                   detokenize=False, logprobs=0, logit_bias=dict.fromkeys(beyond, -100.0) or None)  # fmt: skip
        rooms = [min(self.most - prompt[row], max_tokens or self.most) for row in rows]
        sampling_params = [
            SamplingParams(**shared, max_tokens=room, seed=int(seed[row])) for row, room in zip(rows, rooms)
        ]
        given = [{"prompt_token_ids": tokens[row, : prompt[row]].tolist()} for row in rows]
        results = self.llm.generate(given, sampling_params, use_tqdm=False) if rows else []
        written = [result.outputs[0] for result in results]
        for row, output in zip(rows, written, strict=True):
            response = torch.tensor(output.token_ids)
            tokens[row, prompt[row] : prompt[row] + len(response)] = response
            labels[row, prompt[row] - 1 : prompt[row] - 1 + len(response)] = response
        device = batch.ids.device
        ids, labels = tokens[:, :-1].contiguous().to(device), labels.to(device)
        if rows:  # the longest row, the most sensitive one
            row, output = max(zip(rows, written, strict=True), key=lambda pair: len(pair[1].token_ids))
            logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
            self._compare(ids[row], labels[row], logprobs)
        by_student = (labels != IGNORE).float() * self.learns
        return batch._replace(ids=ids, labels=labels, teacher_rows=None, token_info=TokenInfo(by_student=by_student))

    def _compare(self, ids: Tensor, labels: Tensor, theirs: list[float]) -> None:
        """Raise UserError unless our model and vLLM give the tokens of a row [T] the same log-probabilities."""
        mask = labels != IGNORE
        with eval_mode(self.model):
            ours = self.model.model(input_ids=ids[None], use_cache=False).logits[0, mask].float().log_softmax(-1)
        ours = ours.gather(-1, labels[mask, None])[:, 0]
        gap = (ours - torch.tensor(theirs, device=ids.device)).abs().mean().item()
        if not gap < OFF:
            raise UserError(
                option="rollout.engine",
                got="vllm",
                why=f"vLLM's log-probabilities differ from those of {type(self.model.model).__name__} by {gap:.2f} "
                "nats a token: vLLM did not take the weights, or computes otherwise",
                hint="type rollout.engine=kd",
            )


def check_installed() -> None:
    """Raise UserError if vLLM is not installed."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        hint = "type pip install 'kd[vllm]', or rollout.engine=kd"
        raise UserError(option="rollout.engine", got="vllm", need="the package vLLM, and a GPU", hint=hint)

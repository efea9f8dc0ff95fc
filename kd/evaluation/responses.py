"""Responses of a trained model to the prompts of the validation rows, and their evaluation.

1. sampling   one or more samples per row, each with a seed of its own, so that all models get the same draws
2. text       Rouge-L and exact match against the references, distinct n-grams, length
3. model      divergence of student and teacher on the student's own text, and its growth with length: ExAccErr

q is the student and p the teacher.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kd.data.batches import Batch, Packed, ValidationBatches
from kd.evaluation.catalog import EXACCERR_LENGTH
from kd.evaluation.exposure import TeacherGap, excess_error, teacher_gap
from kd.evaluation.text_scores import Response, exact_match, rouge_l, summary
from kd.evaluation.validation import Validation
from kd.models.causal_lm import CausalLM
from kd.parallel import collectives
from kd.rollout import generate
from kd.rollout.rows import as_rows
from kd.rollout.teacher_text import keep, whole
from kd.runs.seal import EXACCERR, RESPONSES
from kd.system import files
from kd.system.console import StepProgress
from kd.system.hardware import out_of_memory
from kd.system.remote import local_root
from kd.system.signals import requests
from kd.teachers.base import Teacher

AT_ONCE = 64  # rows that are written together


# Writing


class Generations(NamedTuple):
    """Responses as rows of tokens: a sample of all validation rows, then the next."""

    tokens: np.ndarray  # [S * R, T + 1]
    span: np.ndarray  # [S * R, 2] tokens of the prompt, and all without padding


def cache_path(root: str, packed: Packed, teacher: str, **settings) -> Path:
    """Return the file of a teacher's responses to these validation rows, shared by runs with equal settings.

    teacher: its folder, or its name on the Hub. settings: all others that the responses depend on.
    """
    prompts = [packed.digests[f"{name}.npy"] for name in ("val", "val_spans")]
    key = files.digest_of([prompts, files.folder_fingerprint(teacher) or teacher, settings])[:16]
    return local_root(root) / "responses" / f"{key}.npz"


class ResponseEvaluation(Callback):
    """Evaluation of a trained student's responses to the prompts of the validation rows.

    samples: responses per prompt. temperature, seed: of sampling. The measures become part of the metrics of
    `validation`. The folder of the run gets the file RESPONSES, and if there is a teacher model also EXACCERR. The
    teacher's responses are kept in the file `cache` for other runs, unless that is None.

    It runs after the last step, while models, ranks and precision are still set up. The ranks share the rows.
    Checkpoints hold no state of it: a run that is killed during evaluation starts the evaluation again.
    """

    def __init__(
        self, folder: Path, packed: Packed, tokenizer, teacher: Teacher, validation: Validation, cache: Path | None,
        chunk: int | None = None, samples: int = 1, temperature: float = 1.0, seed: int = 0,
    ):  # fmt: skip
        self.folder, self.packed, self.tokenizer, self.cache, self.chunk = folder, packed, tokenizer, cache, chunk
        self.teacher, self.validation = teacher, validation
        self.samples, self.temperature, self.seed, self.at_once = samples, temperature, seed, AT_ONCE

    @torch.no_grad()
    def on_train_end(self, trainer, module) -> None:
        """Run the evaluation. At the end of fit it would be too late: Lightning has moved the student to the CPU."""
        module.eval()
        teacher = self.teacher.model
        with trainer.precision_plugin.val_step_context():
            student_text = self._write(module.student, "the student responds", bool(module.sharded))
            teacher_text = self._of_teacher(teacher, bool(module.sharded)) if teacher else None
            gaps = [self._gap(module, text) for text in (student_text, teacher_text) if text] if teacher else []
        if collectives.rank() == 0:
            metrics = self.validation.metrics
            metrics |= {f"val/{name}": value for name, value in self._result(student_text, teacher_text, gaps).items()}
            for prefix in ("", "teacher_"):
                if f"val/{prefix}lm" in metrics:
                    metrics[f"val/{prefix}perplexity"] = math.exp(metrics[f"val/{prefix}lm"])

    def _of_teacher(self, teacher: CausalLM, sharded: bool) -> Generations:
        """Return the teacher's responses, read from the file if it exists."""
        if self.cache is None:
            return self._write(teacher, "the teacher responds", sharded)
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        first = collectives.rank() == 0
        with filelock.FileLock(f"{self.cache}.lock") if first else nullcontext():
            if collectives.any_rank(first and whole(self.cache)):
                with np.load(self.cache) as saved:
                    return Generations(saved["tokens"], saved["span"])
            written = self._write(teacher, "the teacher responds", sharded)
            if first:
                keep(self.cache, **written._asdict())
            return written

    def _write(self, model: CausalLM, title: str, sharded: bool) -> Generations:
        """Return a model's responses, gathered from all ranks."""
        prompts = self._batches(self.packed.val, self.packed.val_spans, self.at_once, sharded, self.samples)
        device = next(model.parameters()).device
        progress = StepProgress(title, len(prompts.index), 0, "response", collectives.rank() == 0)
        rows: list[tuple] = []  # tokens and span of each response
        tokens = 0

        def watch(done: int, new_tokens: int) -> None:
            requests.end_if_asked()
            progress.update(min(len(rows) + done, progress.steps), tokens + new_tokens)

        try:
            for batch in prompts:
                seed = _seeds(batch.row_ids, len(self.packed.val), self.seed)
                for part in self._generate_with_retry(
                    model, move_data_to_device(batch, device), seed.to(device), watch, sharded
                ):
                    rows += list(
                        zip(*(x.numpy() for x in (as_rows(part)[k] for k in Generations._fields)), strict=True)
                    )
                    tokens = int(sum(span[1] - span[0] for _, span in rows))
        finally:
            progress.stop()
        all_rows = [row for part in collectives.all_gather(rows[: len(prompts.index)]) for row in part]
        return Generations(*(np.stack(x) for x in zip(*all_rows, strict=True)))

    def _generate_with_retry(
        self, model: CausalLM, batch: Batch, seed: Tensor, watch: Callable, sharded: bool
    ) -> list[Batch]:
        """Return batches with responses. If memory runs out, this batch and later ones are halved."""
        if len(seed) <= self.at_once:
            try:
                end, temperature = self.packed.eos_token_id, self.temperature
                return [generate.sample(batch, end, seed, model, temperature=temperature, watch=watch)]
            except (RuntimeError, MemoryError, OSError) as error:
                if len(seed) == 1 or sharded or not out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            self.at_once = -(-len(seed) // 2)
        parts = zip(batch.split(self.at_once), seed.split(self.at_once), strict=True)
        return [written for part in parts for written in self._generate_with_retry(model, *part, watch, sharded)]

    def _batches(
        self, tokens: np.ndarray, spans: np.ndarray, rows: int, sharded: bool, samples: int = 1
    ) -> ValidationBatches:
        """Return this rank's share of rows, `samples` times each. With shards, all ranks get equally many batches."""
        count = samples * len(tokens)
        passes = -(-count // (rows * collectives.world_size())) if sharded else 0
        repeated = np.tile(tokens, (samples, 1)), np.tile(spans, (samples, 1))
        return ValidationBatches(repeated[0], rows, collectives.rank_slice(count), passes, repeated[1])

    def _gap(self, module, text: Generations) -> TeacherGap:
        batches = self._batches(*text, module.micro_batch_size, bool(module.sharded))
        return teacher_gap(module.student, self.teacher, batches, text.tokens.shape[1] - 1, self.chunk)

    def _result(
        self, student_text: Generations, teacher_text: Generations | None, gaps: list[TeacherGap]
    ) -> dict[str, float]:
        """Write the files, and return the measures."""
        spans = self.packed.val_spans
        assert spans is not None, "only prompts have responses"
        written = [self._decode_row(*row) for row in zip(*student_text, strict=True)]
        references = [self._decode_row(*row) for row in zip(self.packed.val, spans, strict=True)] * self.samples
        responses = self._scored(student_text, references)
        result = summary(responses, self.samples)
        lines = [
            {"row": i % len(self.packed.val), "sample": i // len(self.packed.val), "prompt": prompt,
             "reference": reference, **response._asdict()}
            for i, ((prompt, _), (_, reference), response)
            in enumerate(zip(written, references, responses, strict=True))
        ]  # fmt: skip
        if teacher_text:
            teacher_responses = self._scored(teacher_text, references)
            result |= {f"teacher_{name}": value for name, value in summary(teacher_responses, self.samples).items()}
            for line, response in zip(lines, teacher_responses, strict=True):
                line |= {"teacher": response.response, "teacher_rouge_l": response.rouge_l}
            result |= {f"on_policy_{name}": value for name, value in gaps[0].means().items()}
            curve = excess_error(*(gap.by_place[:, :2] for gap in gaps)).tolist()
            result |= {"exaccerr": curve[EXACCERR_LENGTH - 1]} if len(curve) >= EXACCERR_LENGTH else {}
            files.write_json(self.folder / EXACCERR, _curve(curve, gaps))
        with files.atomic(self.folder / RESPONSES) as temporary:
            text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8", newline="")
        return result

    def _scored(self, written: Generations, references: list[tuple[str, str]]) -> list[Response]:
        scored = []
        for tokens, span, (_, reference) in zip(*written, references, strict=True):
            text, ended = self._decode_row(tokens, span)[1], bool(tokens[span[1] - 1] == self.packed.eos_token_id)
            length = int(span[1] - span[0]) - ended
            scored.append(Response(text, length, ended, rouge_l(text, reference), exact_match(text, reference)))
        return scored

    def _decode_row(self, tokens: np.ndarray, span: np.ndarray) -> tuple[str, str]:
        """Return prompt and response of a row, as text."""
        prompt, response = tokens[: span[0]].tolist(), tokens[span[0] : span[1]].tolist()
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        return decode(prompt, skip_special_tokens=False), decode(response, skip_special_tokens=True)


def _seeds(place: Tensor, rows: int, seed: int) -> Tensor:
    """Return a seed for each response at `place` [B]. It depends on sample and row, not on the model."""
    drawn = [np.random.default_rng([seed, *divmod(int(i), rows)]).integers(2**62) for i in place]
    return torch.tensor(drawn, dtype=torch.int64)


def _curve(curve: list[float], gaps: list[TeacherGap]) -> dict:
    """Return ExAccErr over length, with its inputs: mean KL(p || q) and number of responses, by token."""
    by_length = [gap.by_place[: len(curve), :2] for gap in gaps]
    inputs = {writer: {"fkl": (x[:, 1] / x[:, 0]).tolist(), "responses": x[:, 0].long().tolist()}
              for writer, x in zip(("student", "teacher"), by_length, strict=True)}  # fmt: skip
    return {"exaccerr": curve, **inputs}

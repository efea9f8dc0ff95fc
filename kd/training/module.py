"""The LightningModule of a run: one batch is one optimizer step, computed in micro-batches."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import lightning
import torch
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError
from kd.models import adapters, weights
from kd.models.causal_lm import CausalLM
from kd.models.optimizers import parameter_groups
from kd.objective.chunked import Objective, Signal, chunks, default_chunk_size, with_token_info
from kd.objective.target import Target
from kd.objective.token_info import TokenInfo
from kd.objective.token_selection import Measured, Selection
from kd.parallel import collectives, fsdp
from kd.runs.outcome import NonFinite
from kd.system.console import console
from kd.system.hardware import disable_malloc_trim, out_of_memory
from kd.system.signals import Preempted, Stopped, requests
from kd.teachers.base import Teacher
from kd.training.report import LossTerm, StepReport

if TYPE_CHECKING:
    from kd.rollout.base import Rollout

TokenSelection = Callable[[Measured], Selection]


class Schedules(NamedTuple):
    """Share of distillation and learning rate, as functions of the progress of the run in [0, 1]."""

    alpha: Callable[[float], float]
    lr: Callable[[float], float]


class LogitsObserver(Protocol):
    """Receiver of the student's logits in each step."""

    def observe(self, seed: Tensor, rows: slice, logits: Tensor) -> None:
        """Take logits [n, V] of the positions `rows` of a micro-batch, whose position seeds are seed [N]."""

    def discard(self) -> None:
        """Forget the logits of the step so far: it is computed again."""


class DistillationModule(lightning.LightningModule):
    """Student that learns alpha(t) * distillation + (1 - alpha(t)) * language modelling.

    The losses of an optimizer step are summed over its micro-batches and divided once, by its target tokens. So the
    split into micro-batches has no effect. token_selection selects the tokens to distil; the others are learned by
    language modelling alone. It may also give other values that a loss needs per token
    (kd/objective/token_selection.py). rollout provides the text that is distilled. sharded: names of the models,
    student or teacher, that the ranks hold parts of.

    All work outside of the step is in callbacks, which read `last_step` (kd/training/callbacks, kd/evaluation).
    """

    def __init__(
        self, student: CausalLM, teacher: Teacher, objective: Objective, schedules: Schedules,
        optimizer: Callable[[list[dict]], torch.optim.Optimizer], *, max_steps: int, micro_batch_size: int,
        grad_clip: float, token_selection: TokenSelection | None = None, rollout: Rollout | None = None,
        sharded: tuple[str, ...] = (),
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.student, self.teacher = student, teacher  # a Teacher is no nn.Module
        self.trainable_teacher = teacher.model if teacher.trainable else None
        self.objective, self.schedules, self.optimizer = objective, schedules, optimizer
        self.max_steps, self.micro_batch_size, self.grad_clip = max_steps, micro_batch_size, grad_clip
        self.token_selection, self.rollout, self.sharded = token_selection, rollout, sharded
        self.last_step: StepReport | None = None
        # Set by callbacks.
        self.logits_observer: LogitsObserver | None = None
        self.on_micro_batch: Callable[[int, int], None] = lambda done, count: None
        self.end_unfinished_step: Callable[[], None] = _preempt

    def configure_model(self) -> None:
        collectives.broadcast_parameters(self)
        shared = adapters.share_weights(self.student, self.teacher.frozen)  # an adapter is merged in float32
        if self.teacher.frozen and not shared:
            precision = "bf16" if self.trainer.precision == "bf16-mixed" else "fp32"
            weights.hold(self.teacher.frozen, None, precision, self.device)
        models = {"student": self.student, "teacher": self.teacher.model}
        for role in self.sharded:
            model = models[role]
            assert model is not None, f"the {role} is in this process"
            fsdp.shard(model, self.trainer.strategy.root_device)

    def state_dict(self, *args, **kwargs) -> dict:
        """Return the weights that learn: those under an adapter come from its model again."""
        state, frozen = super().state_dict(*args, **kwargs), adapters.frozen_names(self)
        return {name: weight for name, weight in state.items() if name not in frozen} if frozen else state

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load the weights of state_dict(). Those that do not learn stay."""
        state, frozen = super().state_dict(), adapters.frozen_names(self)
        stay = {name: state[name] for name in state if name in frozen}
        return super().load_state_dict(stay | dict(state_dict) if frozen else state_dict, strict, assign)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fused = {"fused": True} if self.device.type == "cuda" else {}  # one kernel for all of it
        return self.optimizer([group | fused for model in self.trained_models() for group in parameter_groups(model)])

    def trained_models(self) -> list[CausalLM]:
        """Return the student, and the teacher if it learns too."""
        return [self.student, *([self.trainable_teacher] if self.trainable_teacher is not None else [])]

    def on_fit_start(self) -> None:
        self.train()  # a pretrained model comes in eval mode, and Lightning leaves it there
        if self.device.type == "cpu":
            disable_malloc_trim()
        if self.teacher.frozen:
            self.teacher.frozen.to(self.device)

    @property
    def progress(self) -> float:
        """Return the middle of this step as a share of the run. A warm-up or decay so wastes no step on a rate of 0."""
        return (self.global_step + 0.5) / max(self.max_steps, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        alpha = self.schedules.alpha(self.progress) if self.teacher.distils else 0.0
        lr, optimizer, interrupted = self.schedules.lr(self.progress), self.optimizers(), False
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        try:
            distill_batch, rollout_tokens = self.run_rollout(batch._replace(lm_batch=None), alpha)
            terms = self.loss_terms(distill_batch, batch, alpha)
            losses = self.retry_with_smaller_micro_batches(terms)
        except Stopped:
            interrupted = True
        if collectives.any_rank(interrupted):
            self._leave_step()
        losses = collectives.all_reduce_sum(losses)
        collectives.all_reduce_gradients(self.parameters())
        limit = self.grad_clip or math.inf
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), limit) for model in self.trained_models()]
        metrics = self._metrics(terms, losses.tolist(), [fsdp.full_tensor(norm).item() for norm in norms], alpha)
        self.check_finite("train", metrics, batch, alpha)
        optimizer.step()
        teacher_positions = sum(t.positions for t in terms if t.kd or self.teacher.trainable)
        self.last_step = StepReport(
            metrics, lr, alpha if self.teacher.distils else None, sum(t.target_tokens for t in terms),
            sum(t.positions for t in terms), teacher_positions, rollout_tokens,
        )  # fmt: skip

    def _metrics(
        self, terms: list[LossTerm], losses: list[float], norms: list[float], alpha: float
    ) -> dict[str, float]:  # fmt: skip
        loss, kd, lm, teacher_lm = losses
        metrics = {"loss": loss, **({"lm": lm} if any(t.lm is not None for t in terms) else {})}
        metrics |= {**({"kd": kd} if alpha else {}), "grad_norm": norms[0]}
        if self.rollout:
            metrics["student_token_share"] = terms[0].student_tokens / max(terms[0].target_tokens, 1)
        if self.teacher.trainable:
            metrics |= {"teacher_lm": teacher_lm, "teacher_grad_norm": norms[1]}
        return metrics

    def run_rollout(self, batch: Batch, alpha: float) -> tuple[Batch, dict[str, float]]:
        """Return the batch to distil, with newly generated text, and the number of tokens that models read for it."""
        if not self.rollout or not alpha:
            return batch, {}
        samplers = self.rollout.samplers
        before = dict(samplers.tokens_read)
        if collectives.world_size() == 1:
            samplers.between = self._stop_if_requested
        written = self.rollout(batch, self.global_step, self.progress)
        info = written.token_info
        if (written.labels is not batch.labels or info is not None) and (info is None or info.by_student is None):
            raise UserError(
                option="rollout",
                why=f"{type(self.rollout).__name__} returns text without token_info.by_student, so that the student's "
                "own text would be learned as if it were data",
                hint="return a batch of Samplers.write, of kd.rollout.rows.only_by_student, or the data unchanged",
            )
        read = torch.tensor([float(samplers.tokens_read[name] - before[name]) for name in ("student", "teacher")])
        student, teacher = collectives.all_reduce_sum(read).tolist()
        return written, {"student": student, "teacher": teacher}

    def loss_terms(self, distill_batch: Batch, batch: Batch, alpha: float) -> list[LossTerm]:
        """Return the loss terms of this step. Language modelling never uses text that the student wrote."""
        info = distill_batch.token_info
        by_student = info is not None and collectives.any_rank(bool(info.by_student.any()))
        if batch.lm_batch is None and not by_student:
            terms: list[tuple[Batch, float | None, float | None]] = [(distill_batch, alpha, 1 - alpha)]
        else:
            lm_batch = batch._replace(lm_batch=None) if batch.lm_batch is None else batch.lm_batch
            terms = [(distill_batch, alpha, None), (lm_batch, None, 1 - alpha)]
            terms = [term for term in terms if term[1] or term[2]]
        counts = [collectives.all_reduce_sum(torch.tensor(_counts(part))) for part, *_ in terms]
        return [LossTerm(*term, *map(int, count)) for term, count in zip(terms, counts, strict=True)]

    def retry_with_smaller_micro_batches(self, terms: list[LossTerm]) -> Tensor:
        """Return the losses of accumulate_gradients(). If memory runs out, try again with half as many rows at once."""
        random_state = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if self.device.type == "cuda" else ())
        while True:
            self.optimizers().zero_grad(set_to_none=True)
            try:
                return self.accumulate_gradients(terms)
            except (RuntimeError, MemoryError, OSError) as error:
                rows = min(self.micro_batch_size, max(len(term.batch.ids) for term in terms))
                selects = self.token_selection is not None
                same_pace = self.sharded or (
                    collectives.world_size() > 1 and selects
                )  # as many micro-batches on each rank
                if rows == 1 or same_pace or not out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # the frames hold the tensors that filled the memory
            self.micro_batch_size = rows // 2
            console.print(
                f"Out of memory with {rows} rows at once: going on with {rows // 2}, the same batch and loss."
            )
            torch.set_rng_state(random_state[0])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state_all(random_state[1:])
            if self.logits_observer:
                self.logits_observer.discard()

    def accumulate_gradients(self, terms: list[LossTerm]) -> Tensor:
        """Compute the gradients of a step, micro-batch by micro-batch.

        Return the means per target token of each term: loss, distillation, language modelling, and the teacher's own
        loss.
        """
        losses, done = torch.zeros(4, dtype=torch.float64, device=self.device), 0
        count = sum(-(-len(term.batch.ids) // self.micro_batch_size) for term in terms)
        for term in terms:
            tokens, kd, lm = max(term.target_tokens, 1), term.kd or 0.0, term.lm or 0.0
            parts = [(part, part.labels != IGNORE) for part in term.batch.split(self.micro_batch_size)]
            signals, selections = self.select_tokens(parts) if kd else ([], [])
            for number, (part, mask) in enumerate(parts):
                if done:
                    self._stop_if_requested()
                    self.on_micro_batch(done, count)
                done += 1
                if signals and not self.teacher.trainable:
                    signal = signals[number]
                else:  # where alpha is 0 the teacher would run for nothing, unless it learns
                    signal = self.teacher.signal(part, mask) if kd or self.teacher.trainable else None
                features = self.student.hidden_states(*part.inputs)[mask]  # [N, D]
                observe = (
                    partial(self.logits_observer.observe, part.position_seeds[mask]) if self.logits_observer else None
                )
                kd_mask = selections[number].kd_mask if kd else None
                kd_signal = with_token_info(signal, selections[number].token_info) if kd else None
                sums = self.objective(
                    self.student.head, features, part.labels[mask], kd_signal, kd / (kd + lm), observe, kd_mask
                )
                self.manual_backward(sums.total * ((kd + lm) / tokens))
                part_sums = [sums.total.detach() * (kd + lm), sums.kd, sums.lm * (term.lm is not None)]
                if (teacher_loss := self.teacher.own_loss(part, mask, signal, self.objective)) is not None:
                    self.manual_backward(teacher_loss / tokens)
                    part_sums.append(teacher_loss.detach())
                losses[: len(part_sums)] += torch.stack([x.to(losses.dtype) for x in part_sums]) / tokens
        return losses

    @torch.no_grad()
    def select_tokens(self, parts: list[tuple[Batch, Tensor]]) -> tuple[list[Signal], list[Selection]]:
        """Return the teacher's signals per micro-batch, empty if no selection reads them, and the selections.

        Tokens are selected over the whole step. So the teacher computes all its signals before the student learns. They
        are kept, except those of a teacher that learns: they are computed again, with what its gradient needs.
        """
        signals: list[Signal] = []
        sizes: list[int] = []  # target positions of each rank

        def measured(measure: Callable[[Target, int], Tensor]) -> Tensor:
            vocabulary, size = self.student.head.vocab, self.objective.chunk or default_chunk_size(self.student.head)
            measures = []
            for part, mask in parts:
                signals.append(self.teacher.signal(part, mask))
                measures += [measure(signals[-1](rows), vocabulary) for rows in chunks(int(mask.sum()), size)]
            all_ranks = collectives.all_gather(torch.cat(measures).cpu())
            sizes.extend(map(len, all_ranks))
            return torch.cat(all_ranks)

        selection = self.token_selection(measured) if self.token_selection else Selection()
        if sizes:
            selection = selection.split(sizes)[collectives.rank()].map(lambda x: x.to(self.device))
        rollout_info = [TokenInfo() if part.token_info is None else part.token_info[mask] for part, mask in parts]
        selections = selection.split([int(mask.sum()) for _, mask in parts])
        return signals, [
            replace(part, token_info=info | part.token_info)
            for part, info in zip(selections, rollout_info, strict=True)
        ]

    def _stop_if_requested(self) -> None:
        """Raise Stopped, between two micro-batches, if this process was requested to end.

        Ranks agree on it after their micro-batches; with sharded models they do so here, since each pass needs all
        ranks.
        """
        if collectives.any_rank(requests.pending) if self.sharded else requests.pending:
            raise Stopped

    def _leave_step(self) -> None:
        """Drop the results of this step, and end the run at the last complete step."""
        self.optimizers().zero_grad(set_to_none=True)
        if self.logits_observer:
            self.logits_observer.discard()
        self.end_unfinished_step()

    def check_finite(
        self, prefix: str, metrics: dict[str, float], batch: Batch | None = None, alpha: float | None = None
    ) -> None:  # fmt: skip
        """Raise NonFinite, with a report, if a metric is not finite. All ranks have to call it with equal metrics."""
        not_finite = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not not_finite:
            return
        weights = {n: fsdp.full_tensor(p).abs().max().item() for n, p in self.student.named_parameters()}
        rows = collectives.all_gather(batch.row_ids.tolist()) if batch is not None else None
        raise NonFinite({
            "what": f"{prefix}/{not_finite[0]}",
            "step": self.global_step,
            "values": {k: str(v) for k, v in metrics.items()},
            "alpha": alpha,
            "lr": self.schedules.lr(self.progress),
            "rows": None if rows is None else [row for part in rows for row in part],
            "largest_weights": {k: str(v) for k, v in sorted(weights.items(), key=lambda x: -x[1])[:5]},
        })  # fmt: skip


def _counts(batch: Batch) -> list[int]:
    """Return the numbers of target tokens, of positions, and of target tokens that the student wrote."""
    mask = batch.labels != IGNORE
    by_student = 0 if batch.token_info is None else int(batch.token_info.by_student[mask].sum())
    return [int(mask.sum()), mask.numel(), by_student]


def _preempt() -> None:
    """End without a checkpoint: no callback saves any."""
    raise Preempted

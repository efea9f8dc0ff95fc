"""The LightningModule around student and teacher. A batch is one optimizer step; micro-batches are taken from it."""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import lightning
import torch
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.errors import UserError
from kd.evaluation.metrics import Measures
from kd.models.causal_lm import Causal
from kd.models.flops import Flops
from kd.objective import token_selection
from kd.objective.chunked import Objective, Signal, chunks, fitting, with_sample
from kd.objective.target import Target
from kd.parallel import collectives, fsdp
from kd.system.console import console
from kd.system.hardware import hold_in, keep_freed, out_of_memory
from kd.system.signals import Stopped, requests
from kd.teachers.sources import Source

if TYPE_CHECKING:
    from kd.rollout.strategies import Rollout
    from kd.store.recorder import Recorder

# What a checkpoint keeps of a run.
STATE = ("tokens", "flops", "seconds", "micro_batch", "train_metrics", "val_metrics", "initial_metrics")
LONG = 10.0  # seconds after which a step is shown by its micro-batches


class Task(NamedTuple):
    """What a step learns of a batch: distillation and language modelling with these weights, None for not at all."""

    batch: Batch
    kd: float | None
    lm: float | None
    tokens: int  # that are counted, on all ranks
    positions: int  # that are computed, prompts and padding too
    own: int  # of the tokens, written by the student


def _counts(batch: Batch) -> list[int]:
    """Of a batch here: tokens that are counted, positions, and of the tokens those that the student wrote."""
    counted = batch.labels != IGNORE
    own = 0 if batch.sampled is None else int(batch.sampled.by_student[counted].sum())
    return [int(counted.sum()), counted.numel(), own]


class NonFinite(RuntimeError):
    """A loss or gradient is inf or NaN; `report` holds what is needed to find out why."""

    def __init__(self, report: dict):
        super().__init__(f"{report['what']} is not finite at step {report['step']}")
        self.report = report


class Distillation(lightning.LightningModule):
    """A student that learns alpha(t) * distillation + (1 - alpha(t)) * language modelling.

    `route` says which tokens are distilled, the others being learned by language modelling alone, or what else a loss
    asks of each (kd/objective/token_selection.py).

    The losses of an optimizer step are summed over all its micro-batches and divided once, by its counted tokens, so
    the split into micro-batches changes nothing. `source` gives the training signal (None: language modelling alone),
    `reference` what validation measures against. A finished `teacher` is kept out of the module tree: it is neither
    saved, nor trained, nor put in train mode; one that `learns` is part of it, and learns by language modelling.
    `rollout` says who writes the text that is distilled.
    `validates_first`: also before the first step, for a student that is not random.
    `recorder` is shown what the student says of each batch. `sharded`: which of student and teacher the ranks hold
    parts of, where there are several.
    """

    def __init__(
        self,
        student: Causal,
        teacher: Causal | None,
        source: Source | None,
        objective: Objective,
        alpha: Callable[[float], float],
        lr: Callable[[float], float],
        optimizer: Callable[[list[dict]], torch.optim.Optimizer],
        steps: int,
        micro_batch: int,
        clip: float,
        log_every: int,
        val_every: int,
        validation: Iterable[Batch],
        flops: Flops,
        bytes_per_token: float | None = None,
        watch: Callable[[int, int, str], None] = lambda step, tokens, also: None,
        reference: Source | None = None,
        learns: bool = False,
        recorder: Recorder | None = None,
        sharded: tuple[str, ...] = (),
        route: Callable[[token_selection.Measured], dict[str, Tensor]] = token_selection.none,
        rollout: Rollout | None = None,
        validates_first: bool = False,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.student = student
        self.teacher = teacher if learns else None
        self.outside = [teacher.eval().requires_grad_(False)] if teacher is not None and not learns else []
        self.reference, self.recorder, self.sharded = reference, recorder, sharded
        self.source, self.objective, self.alpha, self.lr, self.optimizer = source, objective, alpha, lr, optimizer
        self.steps, self.micro_batch, self.clip = steps, micro_batch, clip
        self.log_every, self.val_every, self.validation = log_every, val_every, validation
        self.route, self.routes = route, getattr(route, "func", route) is not token_selection.none
        self.rollout = rollout
        self.validates_first = validates_first or (rollout is not None and rollout.looks_first)
        self.cost, self.bytes_per_token, self.watch = flops, bytes_per_token, watch
        self.tokens, self.flops, self.here = 0, 0.0, 0
        self.seconds = 0.0
        self.end_at_last_step: Callable[[], None] | None = (
            None  # set by kd.training.checkpoints.Checkpoints; raises Preempted
        )
        self.train_metrics: dict[str, float] = {}
        self.val_metrics: dict[str, float] = {}
        self.initial_metrics: dict[str, float] = {}  # of the validation before the first step, if there was one
        self._random_state: dict | None = None

    def configure_model(self) -> None:
        collectives.same_start(self)
        if self.trainer.precision == "bf16-mixed":
            for teacher in self.outside:
                hold_in(torch.bfloat16, teacher)
        teacher = self.outside[0] if self.outside else self.teacher
        for role in self.sharded:
            fsdp.shard({"student": self.student, "teacher": teacher}[role], self.trainer.strategy.root_device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Weight decay on matrices alone, as usual for transformers; inner matrices with the width of their model.

        An output layer of its own is one of them, and one that is the embedding too is not.
        """
        groups = []
        fused = {"fused": True} if self.device.type == "cuda" else {}  # one kernel for all of it
        for causal in filter(None, (self.student, self.teacher)):  # a teacher that learns
            model = causal.model
            outer = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
            kinds: dict[str, list[Tensor]] = {"inner": [], "outer": [], "vectors": []}
            for p in filter(lambda p: p.requires_grad, model.parameters()):
                kinds["vectors" if p.ndim <= 1 else "outer" if id(p) in outer else "inner"].append(p)
            groups.append({"params": kinds["inner"], "width": model.config.get_text_config().hidden_size})
            groups.append({"params": kinds["outer"], "width": None})
            groups.append({"params": kinds["vectors"], "width": None, "weight_decay": 0.0})
        return self.optimizer([group | fused for group in groups if group["params"]])

    def on_fit_start(self) -> None:
        self.train()  # a pretrained model comes in eval mode, and Lightning leaves it there
        if self.device.type == "cpu":
            keep_freed()
        for teacher in self.outside:
            teacher.to(self.device)

    def on_train_start(self) -> None:
        if self.validates_first and self.global_step == 0:
            self.validate()
            self.initial_metrics = dict(self.val_metrics)

    def training_step(self, batch: Batch, index: int) -> None:
        before, stopped = self._state(), False
        progress = self._progress()
        alpha = self.alpha(progress) if self.source is not None else 0.0
        optimizer = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.lr(progress) * group.get("scale", 1.0)
        try:
            tasks = self._tasks(batch, alpha)
            means, teacher_lm = self._gradients(tasks)
        except Stopped:
            stopped = True
        if collectives.any_of(stopped):
            self._abandon(before)
        models = [self.student, *([self.teacher] if self.teacher is not None else [])]
        means = collectives.total(means)
        if self.teacher is not None:
            teacher_lm = collectives.total(torch.tensor(teacher_lm, dtype=torch.float64, device=self.device)).item()
        collectives.sum_gradients(self.parameters())
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), self.clip or math.inf) for m in models]
        norms = [fsdp.whole(norm).item() for norm in norms]
        loss, kd, lm = means.tolist()
        metrics = {"loss": loss, **({"lm": lm} if any(t.lm is not None for t in tasks) else {})}
        metrics |= {**({"kd": kd} if alpha else {}), "grad_norm": norms[0]}
        if self.rollout:
            metrics["by_student"] = tasks[0].own / max(tasks[0].tokens, 1)
        if self.teacher is not None:
            metrics |= {"teacher_lm": teacher_lm, "teacher_grad_norm": norms[1]}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise NonFinite(self._report(f"train/{bad[0]}", metrics, batch, alpha))
        optimizer.step()
        tokens = sum(t.tokens for t in tasks)
        self.tokens += tokens
        self.here += tokens
        asked = sum(t.positions for t in tasks if t.kd or self.teacher is not None)
        self.flops += sum(t.positions for t in tasks) * self.cost.student + asked * self.cost.teacher
        self.train_metrics = {f"train/{k}": v for k, v in metrics.items()}
        self.train_metrics |= {"lr": self.lr(progress), **({"alpha": alpha} if self.source else {})}
        self.train_metrics |= self._axes()

    def _state(self) -> dict:
        """What changes within a step before the weights do."""
        rollout = self.rollout.state() if self.rollout else {}
        rates = [group["lr"] for group in self.optimizers().param_groups]
        return {"random": self._random_states(), "flops": self.flops, "rollout": rollout, "lr": rates}

    def _abandon(self, before: dict) -> None:
        """Go back to the start of a step, and have it saved: the last whole step is where the run goes on."""
        self.optimizers().zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizers().param_groups, before["lr"], strict=True):
            group["lr"] = rate
        if self.recorder:
            self.recorder.pieces.clear()
        if self.rollout:
            self.rollout.load(before["rollout"])
        self.flops, self._random_state = before["flops"], before["random"]
        self.restore_random_state()
        self.end_at_last_step()

    def _stop_if_asked(self) -> None:
        """Between two micro-batches: raise Stopped where this process was asked to end.

        Ranks agree on it after their micro-batches, but for models in shards, of which each pass needs all ranks.
        """
        if collectives.any_of(requests.pending) if self.sharded else requests.pending:
            raise Stopped

    def _tasks(self, batch: Batch, alpha: float) -> list[Task]:
        """What this step learns. Language modelling is never of what the student itself wrote."""
        beside, batch = batch.beside, batch._replace(beside=None)
        told = self._written(batch) if self.rollout and alpha else batch
        own = told.sampled is not None and collectives.any_of(bool(told.sampled.by_student.any()))
        if beside is None and not own:
            tasks = [(told, alpha, 1 - alpha)]
        else:
            tasks = [(told, alpha, None), (batch if beside is None else beside, None, 1 - alpha)]
            tasks = [task for task in tasks if task[1] or task[2]]
        counts = [torch.tensor(_counts(of)) for of, *_ in tasks]
        return [Task(*task, *map(int, collectives.total(n))) for task, n in zip(tasks, counts, strict=True)]

    def _written(self, batch: Batch) -> Batch:
        """What the rollout makes of a batch; what its models read for that counts as compute."""
        writers = self.rollout.writers
        read, before = writers.read, dict(writers.read)
        if collectives.count() == 1:
            writers.between = self._stop_if_asked
        told = self.rollout(batch, self.global_step, self._progress())
        here = torch.tensor([float(read[name] - before[name]) for name in ("student", "teacher")])
        student, teacher = collectives.total(here).tolist()
        self.flops += student * self.cost.student / 3 + teacher * self.cost.teacher  # forward passes alone
        return told

    def _gradients(self, tasks: list[Task]) -> tuple[Tensor, float]:
        """Gradients of a step, and the means of its losses. Out of memory, with half as many rows at once."""
        random_state = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if self.device.type == "cuda" else ())
        while True:
            self.optimizers().zero_grad(set_to_none=True)
            try:
                return self._in_parts(tasks)
            except (RuntimeError, MemoryError, OSError) as error:
                rows = min(self.micro_batch, max(len(task.batch.ids) for task in tasks))
                together = self.sharded or (collectives.count() > 1 and self.routes)  # ranks go on at the same pace
                if rows == 1 or together or not out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            self.micro_batch = rows // 2
            console.print(
                f"Out of memory with {rows} rows at once: going on with {rows // 2}, the same batch and loss."
            )
            torch.set_rng_state(random_state[0])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state_all(random_state[1:])
            if self.recorder:
                self.recorder.pieces.clear()

    def _in_parts(self, tasks: list[Task]) -> tuple[Tensor, float]:
        """Means over the tokens of each task: loss, distillation, language modelling; and that of a teacher's own."""
        means, teacher_lm = torch.zeros(3, dtype=torch.float64, device=self.device), 0.0
        begun, done = time.monotonic(), 0
        count = sum(-(-len(task.batch.ids) // self.micro_batch) for task in tasks)
        for task in tasks:
            tokens, kd, lm = max(task.tokens, 1), task.kd or 0.0, task.lm or 0.0
            parts = [(part, part.labels != IGNORE) for part in task.batch.split(self.micro_batch)]
            asked, known = self._routed(parts) if kd else ([], [])
            for number, (part, kept) in enumerate(parts):
                if done:
                    self._stop_if_asked()
                    if time.monotonic() - begun > LONG:
                        self.watch(self.global_step, self.here, f"micro-batch {done}/{count}  ")
                done += 1
                if asked and self.teacher is None:
                    signal = asked[number]
                else:  # where alpha is 0 the teacher would run for nothing, unless it learns
                    signal = self.source(part, kept) if kd or self.teacher is not None else None
                hidden = self.student.hidden(part.ids)[kept]  # [N, D]
                label = part.labels[kept]
                watch = partial(self.recorder.observe, part.seed[kept]) if self.recorder else None
                which = known[number].pop("distilled", None) if kd else None
                told = with_sample(signal, known[number]) if kd else None
                terms = self.objective(self.student.head, hidden, label, told, kd / (kd + lm), watch, which)
                self.manual_backward(terms.total * ((kd + lm) / tokens))
                seen = (terms.total.detach() * (kd + lm), terms.kd, terms.lm * (task.lm is not None))
                means += torch.stack([x.to(means.dtype) for x in seen]) / tokens
                if self.teacher is not None:
                    own = self.objective(self.teacher.head, signal.hidden, label, None, 0.0)
                    self.manual_backward(own.total / tokens)
                    teacher_lm += own.lm.item() / tokens
        if self.recorder:
            self.recorder.batch(tasks[0].batch, self.global_step)
        return means, teacher_lm

    @torch.no_grad()
    def _routed(self, parts: list[tuple[Batch, Tensor]]) -> tuple[list[Signal], list[dict[str, Tensor]]]:
        """The signals of micro-batches, as far as they were asked, and what is known of their counted positions.

        What a routing says is decided for the whole step, so the teacher is asked of all of it before the student
        learns. Its signals are kept, but for those of a teacher that learns, which are made anew with what its gradient
        needs.
        """
        signals: list[Signal] = []
        own: list[int] = []

        def measured(measure: Callable[[Target, int], Tensor]) -> Tensor:
            vocabulary, size = self.student.head.vocab, self.objective.chunk or fitting(self.student.head)
            found = []
            for part, kept in parts:
                signals.append(self.source(part, kept))
                found += [measure(signals[-1](rows), vocabulary) for rows in chunks(int(kept.sum()), size)]
            everyone = collectives.gather(torch.cat(found).cpu())
            own.extend(map(len, everyone))
            return torch.cat(everyone)

        said = self.route(measured)
        counts = [int(kept.sum()) for _, kept in parts]
        mine = {k: v.split(own)[collectives.number()].to(self.device).split(counts) for k, v in said.items()}
        known = [part.sampled.at(kept) if part.sampled is not None else {} for part, kept in parts]
        return signals, [of | {k: v[number] for k, v in mine.items()} for number, of in enumerate(known)]

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        writers = self.rollout.writers if self.rollout else None
        written = f"writes {writers.tokens / writers.seconds:,.0f} tokens/s  " if writers and writers.seconds else ""
        self.watch(self.global_step, self.here, f"loss {self.train_metrics['train/loss']:.3f}  {written}")
        if self.global_step % self.log_every == 0:
            self._log(self.train_metrics)
        if self.global_step % self.val_every == 0 or self.global_step == self.steps:
            self.validate()

    def _progress(self) -> float:
        """The middle of this step, as a share of the run: a warm-up or decay wastes no step on a rate of 0."""
        return (self.global_step + 0.5) / self.steps

    def _axes(self) -> dict[str, float]:
        """What plots are drawn against."""
        return {"tokens": self.tokens, "flops": self.flops}

    def _log(self, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.global_step)

    @torch.no_grad()
    def validate(self) -> None:
        """The same measures for every run, over all validation rows.

        Called by step, not by Lightning's loop, whose count of batches drifts by one with every resume.
        """
        self.eval()
        measures = Measures(self.objective.chunk)
        with self.trainer.precision_plugin.val_step_context():
            for batch in self.validation:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                kept = batch.labels != IGNORE
                signal = self.reference(batch, kept) if self.reference else None
                hidden = self.student.hidden(batch.ids)[kept]
                measures.update(self.student.head, hidden, batch.labels[kept], signal)
        self.train()
        whole = Measures()
        for tokens, sums in collectives.gather((measures.tokens, {k: v.cpu() for k, v in measures.sums.items()})):
            whole.add(tokens, sums)
        result = whole.result()
        if self.bytes_per_token is not None:
            result["bpb"] = result["lm"] / math.log(2) / self.bytes_per_token
        bad = [name for name, value in result.items() if not math.isfinite(value)]
        if bad:
            raise NonFinite(self._report(f"val/{bad[0]}", result, None, None))
        if self.rollout and "lm" in result:
            self.rollout.validated(result["lm"])
        self.val_metrics = {f"val/{name}": value for name, value in result.items()} | self._axes()
        self._log(self.val_metrics)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Only plain containers and tensors, so that it loads with weights_only=True."""
        checkpoint["kd"] = {name: getattr(self, name) for name in STATE}
        checkpoint["kd"]["random"] = collectives.gather(self._random_states())
        checkpoint["kd"]["rollout"] = collectives.gather(self.rollout.state() if self.rollout else {})

    def _random_states(self) -> dict:
        state = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        for name in checkpoint["kd"].keys() & set(STATE):
            setattr(self, name, checkpoint["kd"][name])
        if self.rollout:
            kept = checkpoint["kd"]["rollout"]
            if len(kept) != collectives.count() and any(map(self.rollout.is_own, kept)):
                raise UserError(
                    f"This run was saved by {len(kept)} processes, each of which keeps what it wrote; it cannot go on "
                    f"with {collectives.count()}. Type trainer.devices={len(kept)}."
                )
            self.rollout.load(kept[min(collectives.number(), len(kept) - 1)])
        states = checkpoint["kd"]["random"]
        # With more ranks than there were, the new ones draw numbers of their own.
        self._random_state = states[collectives.number()] if collectives.number() < len(states) else None

    def restore_random_state(self) -> None:
        """Called where the checkpoint was made, at the start of a batch: what runs before draws from the generators."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state["torch"].cpu())
            version, numbers, gauss = self._random_state["python"]
            random.setstate((version, tuple(numbers), gauss))
            if "cuda" in self._random_state and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random_state["cuda"].cpu(), self.device)
            self._random_state = None

    def _report(self, what: str, metrics: dict, batch: Batch | None, alpha: float | None) -> dict:
        weights = {n: fsdp.whole(p).abs().max().item() for n, p in self.student.named_parameters()}
        return {
            "what": what,
            "step": self.global_step,
            "values": {k: str(v) for k, v in metrics.items()},
            "alpha": alpha,
            "lr": self.lr(self._progress()),
            "rows": [row for rows in collectives.gather(batch.row.tolist()) for row in rows]
            if batch is not None
            else None,
            "largest_weights": {k: str(v) for k, v in sorted(weights.items(), key=lambda x: -x[1])[:5]},
            "last_good": {k: str(v) for k, v in self.train_metrics.items()},
        }

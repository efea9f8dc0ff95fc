"""Cases: functions that train `work.steps` steps, with a call of `work.tick()` after each one.

To add one, write it here and name it in CASES.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kd.bench import offline
from kd.bench.work import WARM_UP, Work
from kd.config.components import CONF
from kd.config.token_info import needs

if TYPE_CHECKING:
    from kd.data.batches import Batches
    from kd.store.reader import Store
    from kd.teachers.base import Teacher

ALPHA, RATE, CLIP = 0.9, 1e-4, 1.0  # share of distillation, learning rate, norm that gradients are cut to


def plainly(work: Work, student, loss_of: Callable) -> None:
    """Run a training loop in plain PyTorch, as a good user writes it."""
    import torch

    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, fused=work.device.type == "cuda")
    for ids, labels in work.batches():
        with work.autocast():
            loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        work.tick()


def lm(work: Work) -> None:
    """Language modelling in plain PyTorch, without a teacher."""
    from torch.nn.functional import cross_entropy

    student = work.student()

    def loss(ids, labels):
        logits = student(input_ids=ids, use_cache=False).logits  # [B, T, V]
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    plainly(work, student, loss)


def full(work: Work) -> None:
    """Distillation in plain PyTorch, with all logits of both models."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    student, teacher = work.student(), work.teacher().to(work.dtype)

    def loss(ids, labels):
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()  # [N, V]
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        kd = kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
        return ALPHA * kd + (1 - ALPHA) * cross_entropy(logits, labels.flatten())

    plainly(work, student, loss)


def trl(work: Work, beta: float = 0.0, on_policy: bool = False) -> None:
    """TRL's GKDTrainer on given text, or on text that the student writes; beta=0 is its forward KL.

    Activations are not checkpointed, as in all cases.
    """
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Tick(TrainerCallback):
        def on_step_end(self, *_, **__):
            work.tick()

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        prompts = ids[:, : -work.shape.response_len]
        return given | {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)} if on_policy else given

    student, teacher = work.student(), work.teacher().to(work.dtype)
    with tempfile.TemporaryDirectory() as folder:
        GKDTrainer(
            model=student, teacher_model=teacher, data_collator=collate, callbacks=[Tick()],
            train_dataset=Dataset.from_dict({"input_ids": work.rows()[:, :-1].tolist()}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>"),
            args=GKDConfig(
                folder, lmbda=float(on_policy), beta=beta, max_new_tokens=work.shape.response_len, temperature=1.0,
                per_device_train_batch_size=work.shape.batch, max_steps=work.steps,
                bf16=work.dtype == torch.bfloat16, use_cpu=work.device.type == "cpu", learning_rate=RATE,
                max_grad_norm=CLIP, gradient_checkpointing=False, report_to="none", save_strategy="no",
                disable_tqdm=True,
            ),
        ).train()  # fmt: skip


def trl_tiled(work: Work, beta: float = 0.0) -> None:
    """The tiled divergence of TRL's DistillationTrainer in a plain loop; that trainer itself only learns on-policy."""
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, teacher = work.student(), work.teacher().to(work.dtype)

    def loss(ids, labels):
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids, use_cache=False).last_hidden_state
        ours = student.model(input_ids=ids, use_cache=False).last_hidden_state.to(work.dtype)
        mask = torch.ones_like(ids)
        return _chunked_divergence_loss(ours, theirs, student.lm_head.weight, teacher.lm_head.weight, mask, beta)[0]

    plainly(work, student, loss)


def liger(work: Work, beta: float = 0.0) -> None:
    """Liger's fused linear JSD in a plain loop; its beta=0 is forward KL."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, teacher = work.student(), work.teacher().to(work.dtype)
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=beta)

    def loss(ids, labels):
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        ours = student.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).to(work.dtype)
        weight = student.lm_head.weight.to(work.dtype)
        return fused(ours, weight, theirs, teacher.lm_head.weight, labels.flatten())

    plainly(work, student, loss)


def online(work: Work, loss: str = "fkl", compile: bool = False, on_policy: bool = False) -> None:
    """kd with logits=online: its own module in Lightning's trainer, built as train.py does."""
    trainer, module, batches = fitted(work, loss, compile, on_policy=on_policy)
    trainer.fit(module, batches)


def fitted(work: Work, loss: str, compile: bool, store: Store | None = None, on_policy: bool = False):
    """Return trainer, module and batches.

    store: of the teacher. on_policy: the student writes the end of each row.
    """
    import torch
    from omegaconf import OmegaConf

    from kd.config import components
    from kd.models.causal_lm import CausalLM
    from kd.objective import target_transforms, temperature, truncation
    from kd.objective.chunked import Objective
    from kd.rollout import strategies
    from kd.rollout.samplers import Samplers
    from kd.teachers.online import OnlineTeacher
    from kd.teachers.stored import StoredTeacher
    from kd.training.module import DistillationModule, Schedules
    from kd.training.trainer import build_trainer

    student = CausalLM(work.student(), work.shape.vocab)
    teacher = StoredTeacher(store) if store else OnlineTeacher(CausalLM(work.teacher(), work.shape.vocab))
    compared = components.build(OmegaConf.to_container(OmegaConf.load(CONF / "loss" / f"{loss}.yaml")), "loss")
    cut = teacher.truncation(store.truncation if store else {"name": "full"}, truncation.full)
    compiled = compile or (None if work.device.type == "cuda" else False)
    objective = Objective(compared, cut, target_transforms.renormalise, temperature.fixed, compile=compiled)
    samplers = Samplers(student, teacher.model, work.shape.vocab - 1, 0)
    module = DistillationModule(
        student, teacher, objective, Schedules(lambda progress: 1.0 if on_policy else ALPHA, lambda progress: RATE),
        partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1),
        max_steps=work.steps, micro_batch_size=work.shape.batch, grad_clip=CLIP,
        rollout=strategies.student(samplers, 1.0) if on_policy else None,
    )  # fmt: skip
    if compile:
        for model in filter(None, (student, teacher.frozen)):
            model.compile_layers()
    trainer = build_trainer(work.steps, work.shape.precision, callbacks=[tick_after_step(work)])
    return trainer, module, batches_of(work, teacher, on_policy)


def tick_after_step(work: Work):
    """Return a callback that ticks when a step is done."""
    from lightning.pytorch.callbacks import LambdaCallback

    return LambdaCallback(on_train_batch_end=lambda *_: work.tick())


def batches_of(work: Work, teacher: Teacher, on_policy: bool) -> Batches:
    """Return batches of random ids, with prompts as long as TRL's."""
    import numpy as np

    from kd.data.batches import Batches

    rows = work.rows()
    prompt = work.shape.seq_len - work.shape.response_len
    spans = np.tile([prompt, work.shape.seq_len], (len(rows), 1)) if on_policy else None
    return Batches(rows, work.shape.batch, 0, 0, work.steps, read_teacher=teacher.read, response_spans=spans)


class Stopwatch:
    """Times of the parts of kd's step, in seconds, without the parts that are called from within."""

    def __init__(self, device):
        self.device, self.parts, self.inner = device, {}, [0.0]

    def watch(self, owner, name: str, part: str) -> None:
        """Add the time of owner.name to `part`."""
        call = getattr(owner, name)

        def timed(*arguments, **options):
            start = self._now()
            self.inner.append(0.0)
            try:
                return call(*arguments, **options)
            finally:
                spent = self._now() - start
                self.parts[part] = self.parts.get(part, 0.0) + spent - self.inner.pop()
                self.inner[-1] += spent

        setattr(owner, name, timed)

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def breakdown(work: Work) -> dict[str, dict[str, float]]:
    """Return seconds per part of a step of online_fkl, after the warm-up."""
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from kd.objective import signals
    from kd.objective.chunked import Objective

    trainer, module, batches = fitted(work, "fkl", False)
    clock = Stopwatch(work.device)
    teacher = module.teacher.frozen
    clock.watch(module, "training_step", "rest")
    clock.watch(module, "manual_backward", "student's body")
    clock.watch(module.student, "hidden_states", "student's body")
    clock.watch(teacher, "hidden_states", "teacher's body")
    clock.watch(Objective, "__call__", "products with the heads")
    clock.watch(Objective, "logits_gradient", "softmax, loss and gradient")
    clock.watch(signals, "log_probabilities", "softmax, loss and gradient")
    for model in (module.student, teacher):
        clock.watch(model.head, "forward", "products with the heads")
    clock.watch(torch.optim.AdamW, "step", "optimizer")
    clock.watch(torch.nn.utils, "clip_grad_norm_", "optimizer")

    def forget_warm_up(*_) -> None:
        if len(work.ticks) == WARM_UP:
            clock.parts.clear()

    trainer.callbacks.append(LambdaCallback(on_train_batch_end=forget_warm_up))
    trainer.fit(module, batches)
    counted = work.steps - WARM_UP
    parts = sorted(clock.parts.items(), key=lambda item: -item[1])
    return {"parts": {part: seconds / counted for part, seconds in parts}}


LOSSES = sorted(path.stem for path in (CONF / "loss").glob("*.yaml") if not needs(path.stem))  # of token information
CASES: dict[str, Callable[[Work], dict | None]] = {
    "lm": lm,
    "full": full,
    "trl": trl,
    **{f"online_{loss}": partial(online, loss=loss) for loss in LOSSES},
    "online_fkl_compiled": partial(online, compile=True),
    "trl_on_policy": partial(trl, beta=0.5, on_policy=True),
    "on_policy_jsd": partial(online, loss="jsd", on_policy=True),
    **{f"offline_{name}": partial(offline.train, truncation_name=name) for name in ("random", "top_50", "full")},
    "forward": offline.forward,
    **{f"write_{name}": partial(offline.write, truncation_name=name) for name in ("random", "top_50", "full")},
    **{f"read_{name}": partial(offline.read, truncation_name=name) for name in ("random", "top_12", "top_50")},
    "breakdown": breakdown,
}
CUDA_CASES: dict[str, Callable[[Work], dict | None]] = {
    **{f"online_{loss}_compiled": partial(online, loss=loss, compile=True) for loss in ("rkl", "jsd", "akl")},
    "offline_top_50_compiled": partial(offline.train, truncation_name="top_50", compile=True),
    "trl_jsd": partial(trl, beta=0.5),
    "trl_tiled": trl_tiled,
    "trl_tiled_jsd": partial(trl_tiled, beta=0.5),
    "liger": liger,
    "liger_jsd": partial(liger, beta=0.5),
}
# Package, beside kd's own, that a case needs.
NEEDS = {name: "trl" for name in (*CASES, *CUDA_CASES) if name.startswith("trl")}
NEEDS |= {name: "liger_kernel" for name in CUDA_CASES if name.startswith("liger")}

"""Recording of a student's logits during training, as a store for students of its own."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from kd.store.recorder import Recorder


class LogitsRecorder(Callback):
    """Gives the logits of every step to the recorder of a store."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def setup(self, trainer, module, stage) -> None:
        module.logits_observer = self.recorder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.recorder.batch(batch, trainer.global_step - 1)  # the step that is done

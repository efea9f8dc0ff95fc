"""Arguments of Lightning's Trainer for several ranks."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy

from kd.parallel.collectives import rank, world_size


class ManualDDP(DDPStrategy):
    """Lightning's DDP without its wrapper, which would sum gradients with every micro-batch, and average them.

    The module calls parts of its models several times per step. It sums gradients once, by all_reduce_gradients().
    """

    def configure_ddp(self) -> None:
        pass


def lightning_arguments(devices: int, sharded: bool) -> dict:
    """Return the arguments of Lightning's Trainer that concern processes.

    sharded: True if each rank holds a part of student and optimizer, see kd/parallel/fsdp.py.
    """
    from kd.parallel.fsdp import FSDP2Strategy

    # Named, so that none is detected: within a job of SLURM, say, Lightning would ask for as many tasks as ranks, and
    # requeue the job itself.
    plugins = [LightningEnvironment()]
    rank_zero_only.rank = rank()  # the environment may give another rank
    if world_size() == 1:
        return {"devices": 1, "plugins": plugins}
    strategy = FSDP2Strategy(world_size()) if sharded else ManualDDP()
    return {
        "devices": devices, "strategy": strategy, "plugins": plugins, "use_distributed_sampler": False
    }  # fmt: skip

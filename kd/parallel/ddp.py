"""Lightning's view of several ranks."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy

from kd.parallel.collectives import rank, world_size


class ManualDDP(DDPStrategy):
    """Lightning's DDP without its wrapper, which would sum gradients with every micro-batch, and average them.

    The module calls parts of its models by themselves, several times per step, and sums once, by sum_gradients().
    """

    def configure_ddp(self) -> None:
        pass


def lightning_arguments(devices: int, sharded: bool) -> dict:
    """What the Trainer is told of the processes. sharded: student and optimizer, see kd/parallel/fsdp.py."""
    from kd.parallel.fsdp import FSDP2Strategy

    # Named, so that none is detected: within a job of SLURM, say, Lightning would ask for as many tasks as ranks, and
    # requeue the job itself.
    alone = [LightningEnvironment()]
    rank_zero_only.rank = rank()  # whatever the environment said when Lightning was loaded
    if world_size() == 1:
        return {"devices": 1, "plugins": alone}
    strategy = FSDP2Strategy(world_size()) if sharded else ManualDDP()
    return {
        "devices": devices, "strategy": strategy, "plugins": alone, "use_distributed_sampler": False
    }  # fmt: skip

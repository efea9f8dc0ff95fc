"""Arguments of Lightning's Trainer for several ranks."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy

from kd.parallel.collectives import rank, world_size
from kd.system.launchers import by_torchrun


class ManualDDP(DDPStrategy):
    """Lightning's DDP without its wrapper, which would sum gradients with every micro-batch, and average them.

    The module calls parts of its models several times per step. It sums gradients once, by all_reduce_gradients().
    """

    def configure_ddp(self) -> None:
        pass


def lightning_arguments(devices: int, sharded: bool) -> dict:
    """Return the arguments of Lightning's Trainer that concern processes.

    devices: those of a machine. sharded: True if each rank holds a part of student and optimizer, see
    kd/parallel/fsdp.py.
    """
    from kd.parallel.fsdp import FSDP2Strategy

    rank_zero_only.rank = rank()  # the environment may give another rank
    # Environments are named, so that none is detected: within a job of SLURM, say, Lightning would ask for as many
    # tasks as ranks, and requeue the job itself.
    if world_size() == 1:
        return {"devices": 1, "plugins": [LightningEnvironment()]}
    environment = TorchElasticEnvironment() if by_torchrun() else SLURMEnvironment(auto_requeue=False)
    return {
        "devices": devices, "num_nodes": world_size() // devices, "plugins": [environment],
        "strategy": FSDP2Strategy(world_size()) if sharded else ManualDDP(), "use_distributed_sampler": False,
    }  # fmt: skip

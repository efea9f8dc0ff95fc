"""Place of a process among the ranks of a run, as torchrun, srun or kd/launch/rank_launcher.py gives it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kd.config.groups import TrainerConfig
from kd.errors import UserError
from kd.system import launchers


@dataclass(frozen=True)
class Place:
    """Place of this process among the ranks of a run. address, port: those of the store that they share."""

    rank: int
    world_size: int
    local_rank: int  # on its machine
    address: str
    port: int

    @property
    def serves(self) -> bool:
        """True if this process is the server of the store, and not an agent of torchrun."""
        return self.rank == 0 and launchers.given.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def place_of(trainer: TrainerConfig) -> Place | None:
    """Return the place of this process among the ranks of its run; None if no launcher started it as one of them.

    Raises UserError if a launcher started other ranks than the run has.
    """
    given = launchers.given
    if launchers.by_torchrun():
        launcher, per_machine = "torchrun", int(given.get("LOCAL_WORLD_SIZE", trainer.devices))
        rank, world_size, local_rank, port = (
            int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        place = Place(rank, world_size, local_rank, given["MASTER_ADDR"], port)
        _check_restarts(trainer)
    elif trainer.ranks > 1 and launchers.by_srun(os.environ):
        launcher, place = "srun", _place_in_slurm()
        per_machine = int(os.environ["SLURM_NTASKS_PER_NODE"])
    elif trainer.nodes > 1:
        why, hint = "this process is the only one", "start the same command on each machine, by srun or so:"
        command = f"torchrun --nnodes={trainer.nodes} --nproc-per-node={trainer.devices} --rdzv-backend=c10d "
        commands = [f"{command}--rdzv-endpoint=HOST train.py …"]
        raise UserError(option="trainer.nodes", got=trainer.nodes, why=why, hint=hint, commands=commands)
    else:
        return None
    if (place.world_size, per_machine) != (trainer.ranks, trainer.devices):
        raise UserError(
            option="trainer.devices",
            got=trainer.devices,
            conflict=f"trainer.nodes={trainer.nodes}",
            why=f"{launcher} started {place.world_size} processes, {per_machine} on each machine",
            hint=f"type trainer.devices={per_machine} trainer.nodes={place.world_size // per_machine}",
        )
    return place


def _check_restarts(trainer: TrainerConfig) -> None:
    """Refuse restarts that the agent of this process does not do."""
    most = trainer.max_restarts
    if most not in (0, int(launchers.given.get("TORCHELASTIC_MAX_RESTARTS", 0))):
        why, hint = "torchrun starts the ranks again, not kd", f"type torchrun --max-restarts={most} … instead"
        raise UserError(option="trainer.max_restarts", got=most, why=why, hint=hint)


def _place_in_slurm() -> Place:
    """Return the place of this task of SLURM, as Lightning reads it."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    os.environ.update(launchers.given)
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    try:
        task = SLURMEnvironment(auto_requeue=False)
        return Place(task.global_rank(), task.world_size(), task.local_rank(), task.main_address, task.main_port)
    except RuntimeError as error:
        raise UserError(option="srun", why=str(error), hint="start the tasks with --ntasks-per-node") from None
    finally:
        launchers.forget_ranks(os.environ)  # with the address and the port of the store

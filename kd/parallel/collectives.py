"""Collective operations over the ranks of a run; with one process they are the identity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd.config.groups import TrainerConfig
from kd.errors import UserError

BUCKET = 2**24  # gradients per collective operation


def world_size() -> int:
    """Return the number of ranks of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank. Rank 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_slice(rows: int) -> slice:
    """Return the rows of this rank. Shares are equal; if they cannot be, the first ranks have one row more."""
    per_rank, remainder = divmod(rows, world_size())
    start = rank() * per_rank + min(rank(), remainder)
    return slice(start, start + per_rank + (rank() < remainder))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks, computed in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Return True if `flag` is true on any rank."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(int(flag))))  # by gloo, whatever the device


def all_gather(value) -> list:
    """Return the values of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all ranks in place, so that every rank has those of the whole batch."""
    if world_size() == 1:
        return
    # FSDP sums the gradients of a sharded model in the backward pass.
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    while grads:
        bucket: list[Tensor] = []
        size = 0
        while grads and (not bucket or (size + grads[0].numel() <= BUCKET and grads[0].dtype == bucket[0].dtype)):
            bucket.append(grads.pop(0))
            size += bucket[-1].numel()
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(summed.view_as(grad))


def broadcast_parameters(model: torch.nn.Module) -> None:
    """Give all ranks the weights of rank 0, and each rank its own stream of random numbers (dropout)."""
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)
        torch.manual_seed(torch.initial_seed() + rank())


def cpu_group(accelerator: str) -> str:
    """Return the type of device that ranks compute on: cpu or cuda."""
    return "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def device(accelerator: str) -> torch.device:
    """Return the device that this rank computes on."""
    kind = cpu_group(accelerator)
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def check_devices(trainer: TrainerConfig) -> None:
    """Raise UserError if this machine has fewer devices than ranks."""
    available = torch.cuda.device_count() if cpu_group(trainer.accelerator) == "cuda" else trainer.devices
    if trainer.accelerator == "mps":
        available = 1
    if trainer.devices > available:
        raise UserError(
            option="trainer.devices",
            got=trainer.devices,
            why=f"this machine has {available}",
            hint=f"type trainer.devices={available}, or trainer.accelerator=cpu for ranks that share its processor",
        )

"""FSDP2 for models that are too large for one device, and their checkpoints: sharded and asynchronous."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from kd.errors import UserError
from kd.models.causal_lm import CausalLM
from kd.parallel import collectives
from kd.system import files
from kd.system.checkpoint_files import checked, load, seal
from kd.system.hardware import capacity

META = "meta.pt"  # the rest of a checkpoint, without weights and optimizer states
FILE = re.compile(r"__\d+_\d+\.distcp")
INDEX = "index.json"  # places of the tensors in the files of the ranks


def shard(model: CausalLM, device: torch.device) -> None:
    """Shard every weight over the ranks, in place; each layer is gathered while it computes.

    Gradients are summed over ranks, not averaged. The output layer computes outside of hidden_states(). So output layer
    and embeddings stay gathered from there to the end of the backward pass.
    """
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a sharded tensor. All ranks have to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights of a sharded model, on the CPU of rank 0; empty on the others. All ranks have to call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 with checkpoints that are written while the training goes on.

    A checkpoint is a folder with a file per rank. It gets its name and its digest once all of it is on the disk.
    """

    def __init__(self, count: int):
        super().__init__(data_parallel_size=count, tensor_parallel_size=1)
        self.writing: Future | None = None  # checkpoint that is being written
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.group = None

    def save_checkpoint(self, checkpoint: dict, filepath, storage_options=None) -> None:
        self.finish_writing()
        if self.group is None:  # separate, since the training runs collectives at the same time
            self.group = dist.new_group(backend="gloo")
        path = Path(filepath)
        temporary = path.with_name(f".{path.name}.ranks.tmp")
        if collectives.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier(self.group)
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": value for i, value in enumerate(checkpoint.pop("optimizer_states", []))}
        if collectives.rank() == 0:
            torch.save(checkpoint, temporary / META)
        future = dcp.async_save(state, storage_writer=Writer(temporary), process_group=self.group)
        self.writing = self.thread.submit(self._seal, future, temporary, path)

    def _seal(self, future, temporary: Path, path: Path) -> None:
        future.result()  # on rank 0: the writes of all ranks
        if collectives.rank() == 0:
            seal(temporary, path)

    def finish_writing(self) -> None:
        """Wait for the checkpoint that is being written; raise the error of a write that failed."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def load_checkpoint(self, checkpoint_path, weights_only=None) -> dict:
        """Load a checkpoint as Lightning does, but with our reader. torch's reader runs code that a checkpoint
        contains.
        """
        path = Path(checkpoint_path)
        rest = checked(load(path / META), path)
        state = {"state_dict": get_model_state_dict(self.model)}
        read(state, path)
        self.model.load_state_dict(state["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            read(state, path)
            whole = state[f"optimizer_{number}"]
            set_optimizer_state_dict(self.model, optimizer, whole, options=StateDictOptions(cpu_offload=True))
        return rest


class Writer(dcp.FileSystemWriter):
    """Writer of shards as torch's, but with an index in JSON. torch's index is a pickle, which can run code when read.

    index.json has, for each tensor, its type, size and chunks. A chunk has an offset in the tensor and a place in a
    file. Anything that is no tensor has only a place in a file.
    """

    def finish(self, metadata: Metadata, results) -> None:
        places = {result.index: result.storage_data for rank in results for result in rank}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                chunks = [
                    {"offset": list(chunk.offsets), "size": list(chunk.sizes)}
                    | _place(places[MetadataIndex(name, chunk.offsets)])
                    for chunk in entry.chunks
                ]
                dtype = str(entry.properties.dtype).removeprefix("torch.")
                index[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
            else:
                index[name] = _place(places[MetadataIndex(name)])
        files.write_json(Path(self.path) / INDEX, index)


def _place(info: _StorageInfo) -> dict:
    return {"file": info.relative_path, "start": info.offset, "length": info.length}


class Reader(dcp.FileSystemReader):
    """Reader of the shards that Writer wrote. It reads no other shards."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        try:
            index = json.loads((Path(self.path) / INDEX).read_text())
            return _metadata(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                option=self.path,
                why=f"is no checkpoint of kd ({error})",
                hint="if it is from elsewhere, remove its folder",
                commands=[shlex.join(["rm", "-r", str(Path(self.path).parent)])],
            ) from None


def _metadata(index: dict) -> Metadata:
    """Return the index in torch's form. Raises various errors for an index that Writer did not write."""
    entries, places = {}, {}

    def place(note: dict) -> _StorageInfo:
        if not FILE.fullmatch(note["file"]):
            raise ValueError(f"{note['file']} is no file of it")
        return _StorageInfo(note["file"], int(note["start"]), int(note["length"]))

    for name, entry in index.items():
        if "dtype" not in entry:
            entries[name], places[MetadataIndex(name)] = BytesStorageMetadata(), place(entry)
            continue
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{entry['dtype']} is no type of numbers")
        chunks = [ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["size"])) for c in entry["chunks"]]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry["size"]), chunks)
        places |= {MetadataIndex(name, c["offset"]): place(c) for c in entry["chunks"]}
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


class Plain(dcp.DefaultLoadPlanner):
    """Load planner that reads values other than tensors (optimizer settings) as plain containers.

    torch's planner runs code that they contain.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(load(self.path, part=value), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def read(state: dict, path: Path, **settings) -> None:
    """Fill `state` from the shards at `path`. All ranks have to call it.

    Raises UserError for shards that Writer did not write.
    """
    try:
        dcp.load(state, storage_reader=Reader(path), planner=Plain(path), **settings)
    except CheckpointException as error:  # a BaseException of torch
        raise next(failure for failure, _ in error.failures.values()) from None


def fits_unsharded(size: int, device: torch.device) -> bool:
    """Return True if a whole teacher of so many bytes takes at most a quarter of each rank's memory."""
    sharing = 1 if device.type == "cuda" else collectives.world_size()
    return size <= capacity(device) / sharing / 4

"""Environment variables by which launchers (srun, torchrun, mpirun, jsrun, …) give each process a rank.

Libraries obey them: Lightning, for example, writes nothing except on rank 0. A program of kd may be started within
another person's srun or with left-over variables, and is then a run of its own. So each program of kd first takes the
variables out of its environment. kd/parallel/rendezvous.py decides if they make the process a rank. A program of others
that imports kd keeps its variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

RANKS = re.compile(
    r"((GLOBAL|LOCAL|NODE|GROUP|ROLE|CROSS|MPIRUN)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|MASTER_(ADDR|PORT)|"
    r"SLURM_(PROCID|LOCALID|NODEID)|TORCHELASTIC_\w+|(OMPI_COMM_WORLD|OMPI_UNIVERSE|PMI|PMIX|MPI|MPICH|JSM_NAMESPACE|"
    r"MV2_COMM_WORLD|HOROVOD|FLUX_TASK|PALS)_\w+|ALPS_APP_PE"
)
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}

given: dict[str, str] = {}  # variables that this process was started with
parent = os.getppid()  # process that started this one, even if that ends during the imports


def forget_ranks(environment: MutableMapping[str, str]) -> None:
    """Remove every variable that gives a rank from the environment; `given` has them afterwards."""
    given.clear()
    given.update({name: environment.pop(name) for name in list(environment) if RANKS.fullmatch(name)})


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that give a rank."""
    return {name: value for name, value in environment.items() if not RANKS.fullmatch(name)}


def by_torchrun() -> bool:
    """Return True if torchrun, or a launcher that sets the same variables, started this process as one of several."""
    return given.keys() >= TORCHRUN and given["WORLD_SIZE"] != "1"


def by_srun(environment: Mapping[str, str]) -> bool:
    """Return True if srun started this process as one of several tasks. A batch script itself is no task."""
    return "SLURM_PROCID" in given and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"

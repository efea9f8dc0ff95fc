"""Environment variables by which launchers (srun, torchrun, mpirun, jsrun, …) give each process a rank.

Libraries obey them: Lightning, for example, writes nothing except on rank 0. A program of kd is always rank 0 of its
own run, also within another person's srun or with left-over variables. Only kd/launch gives ranks to the processes of a
run. So each program of kd removes the variables first. A program of others that imports kd keeps its own.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

OWN = "KD_RANK"  # what kd.launch.rank_launcher gives each process that it starts
RANKS = re.compile(
    r"((GLOBAL|LOCAL|NODE|GROUP|ROLE|CROSS|MPIRUN)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|MASTER_(ADDR|PORT)|"
    r"SLURM_(PROCID|LOCALID|NODEID)|TORCHELASTIC_\w+|(OMPI_COMM_WORLD|OMPI_UNIVERSE|PMI|PMIX|MPI|MPICH|JSM_NAMESPACE|"
    r"MV2_COMM_WORLD|HOROVOD|FLUX_TASK|PALS)_\w+|ALPS_APP_PE"
)


def forget_ranks(environment: MutableMapping[str, str]) -> None:
    """Remove every variable that gives a rank, and set those that Lightning reads if kd gave this process a rank."""
    rank = environment.pop(OWN, None)
    for name in [name for name in environment if RANKS.fullmatch(name)]:
        del environment[name]
    if rank is not None:
        environment.update(LOCAL_RANK=rank, NODE_RANK="0")

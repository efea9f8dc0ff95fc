"""A package of other people, with functions and options."""

import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "kd-example"
FILES = {
    "__init__.py": "raise RuntimeError('imported')\n",
    "losses.py": """
from kd.objective.token_info import needs, provides
from kd.teachers.base import traits

def mine(student, target, beta: float = 0.5):
    '''Own loss, nats [N].'''

@needs("advantage")
def needy(student, target): ...

def akl(student, target): ...

def helper(path: str): ...

def _hidden(student, target): ...

class Loss: ...

@provides("advantage")
def giver(samplers, share: float = 0.5): ...

@traits("trains_teacher")
def source(origin): ...
""",
    "rollouts.py": """
from kd.rollout.base import traits

@traits("writes_all", until=1.0)
def early(samplers, until: float = 0.5): ...

@traits("writes_all", until=1.0)
def usual(samplers, until: float = 1.0): ...

@traits("by_teacher")
def best(samplers, draws: int = 4): ...
""",
    "data.py": """
from kd.data.corpora import Corpus

def texts(lines: int = 3) -> Corpus: ...

def run(command: str) -> None: ...
""",
    "conf/loss/mine.yaml": "_target_: mypkg.losses.mine\nbeta: 0.5\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def entry_point(root: Path, package: str) -> None:
    """Make a package of a folder of sys.path the plug-in of an installed distribution."""
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: my-{package}\nVersion: 1.2\n",
        "entry_points.txt": f"[kd.plugins]\nany = {package}\n",
        "top_level.txt": f"{package}\nextra_{package}\n",
    }
    write(root / f"my_{package}-1.2.dist-info", about)


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]

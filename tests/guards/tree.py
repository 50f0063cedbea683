"""The files of the project, and copies of them to break."""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What stands in no checkout; used where there is no git to ask.
_LEFT_BEHIND = frozenset(
    (".git", ".venv", "__pycache__", "node_modules", "dist", "build", ".mypy_cache", ".ruff_cache", ".pytest_cache")
)


PATIENCE_SECONDS = 180
"""For one run of a tool over the whole project, on a machine that does much else."""


def project_files(root: Path = ROOT) -> list[Path]:
    """Every file of the project, relative to `root`: what git tracks or would, sorted."""
    if (root / ".git").exists():
        command = ["git", "-c", f"safe.directory={root}", "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode()
        paths = [Path(name) for name in listed.split("\0") if name]
    else:
        paths = [path.relative_to(root) for path in root.rglob("*")]
    return sorted(path for path in paths if (root / path).is_file() and _LEFT_BEHIND.isdisjoint(path.parts))


def copy_project(target: Path, source: Path = ROOT) -> Path:
    """Copies the project into the empty folder `target` and returns it."""
    for path in project_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, target / path)
    return target


def mend(copy: Path, pristine: Path) -> None:
    """Makes a copy's files those of a pristine one again; caches of tools, which are no files of the project, stay."""
    wanted, found = set(project_files(pristine)), set(project_files(copy))
    for path in found - wanted:
        (copy / path).unlink()
    for path in wanted:
        if path not in found or not filecmp.cmp(pristine / path, copy / path, shallow=False):
            (copy / path).unlink(missing_ok=True)
            shutil.copyfile(pristine / path, copy / path)


def make(tree: Path, target: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `make TARGET` in a copy with the environment of this interpreter; output and errors together."""
    settings = [f"{name}={value}" for name, value in {"PY": sys.executable, **variables}.items()]
    return subprocess.run(
        ["make", "-C", str(tree), target, *settings],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE_SECONDS - 10,
    )

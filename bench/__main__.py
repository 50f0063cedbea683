"""Runs benchmarks one after another: all in this folder, or those named. `python -m bench [NAME...]`, `make bench`.

Each is a script of its own in a process of its own, so that none warms or slows another; its head says what it measures
and against what.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    """Runs them; exits with 1 where a name is unknown or a benchmark fails."""
    modules = {path.stem for path in FOLDER.glob("*.py")} | {path.parent.name for path in FOLDER.glob("*/__main__.py")}
    there = sorted(name for name in modules if not name.startswith("_"))
    wanted = sys.argv[1:] or there
    if unknown := sorted(set(wanted) - set(there)):
        raise SystemExit(f"no benchmark named {', '.join(unknown)}; there are {', '.join(there)}")
    failed = []
    for name in wanted:
        sys.stdout.write(f"== {name}\n")
        sys.stdout.flush()
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], cwd=FOLDER.parent, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

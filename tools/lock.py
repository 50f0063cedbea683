"""Writes requirements.lock and requirements-dev.lock from pyproject.toml: names, versions, hashes, nothing else.

    python tools/lock.py [--upgrade]

The locks hold for every platform and for every Python that the project supports (markers where they differ).
Versions that are locked already stay, unless `--upgrade` is given. No line names a package index: who installs
chooses where from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# --no-config: a user's own settings must not change what everyone gets.
COMPILE = (
    *("pip", "compile", "pyproject.toml", "--quiet", "--no-config", "--universal", "--python-version", "3.11"),
    *("--generate-hashes", "--no-header", "--no-emit-package", "fleet-commander"),
    *("--no-emit-index-url", "--no-emit-find-links"),
)
LINE = re.compile(
    r"(?P<pin>[a-z0-9._-]+==\S+( ; .+?)? \\)|(?P<hash>    --hash=sha256:[0-9a-f]{64}( \\)?)|(?P<why> +#( .*)?)"
)


def _compile(output: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "uv", *COMPILE, "--output-file", output, *arguments]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"uv could not resolve {output}: see its message above")
    lines = (ROOT / output).read_text(encoding="utf-8").splitlines()
    for line in lines:
        if not LINE.fullmatch(line):
            raise SystemExit(f"{output}: a line that is neither a pin nor a hash nor a reason: {line}")


def main() -> None:
    """Writes both locks; the development lock follows the versions of the runtime's."""
    upgrade = ["--upgrade"] if "--upgrade" in sys.argv[1:] else []
    _compile("requirements.lock", "--group", "build", *upgrade)
    groups = ("--group", "bench", "--group", "build", "--group", "dev")
    everything = (*groups, "--constraints", "requirements.lock")
    _compile("requirements-dev.lock", *everything, *upgrade)


if __name__ == "__main__":
    main()

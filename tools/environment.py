"""Makes the project's virtual environment, or does nothing where it is already right.

    python3 tools/environment.py runtime    what `make up` needs
    python3 tools/environment.py dev        and what the tests, the checks and the generator need

Everything comes from the lock files, by hash; the project itself is installed as editable. A stamp in the
environment holds a digest of what it was made from, so that a second call costs some milliseconds. Callers at the
same time wait for each other. Standard library alone, and a syntax that older interpreters can read, so that they
get a message.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv"
PYTHON = HOME / "bin" / "python"
LOCKS = {"runtime": "requirements.lock", "dev": "requirements-dev.lock"}
OLDEST = (3, 11)
# Settings of the caller's shell that would make pip install elsewhere.
_MISLEADING = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _digest(level: str) -> str:
    """What an environment of this level is made from; any change of it means to install again."""
    parts = [str(ROOT).encode(), (ROOT / LOCKS[level]).read_bytes(), (ROOT / "pyproject.toml").read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _stamp(level: str) -> Path:
    return HOME / f".installed-{level}"


def _ready(level: str) -> bool:
    stamp = _stamp(level)
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == _digest(level)


def _runs() -> bool:
    """Whether an environment is there, was made for this folder, and its interpreter still starts."""
    marker = HOME / ".made-for"
    if not PYTHON.exists() or (marker.exists() and marker.read_text() != str(ROOT)):
        return False
    return subprocess.run([PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, check=False).returncode == 0


def _pip(*arguments: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in _MISLEADING}
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise SystemExit(f"pip failed: see above. Mend the cause and run make again; {HOME} may be deleted.")


def _install(level: str) -> None:
    if not _runs():
        _say(f"Making a virtual environment in {HOME}")
        try:
            venv.EnvBuilder(clear=True, with_pip=True, symlinks=True).create(HOME)
        except (subprocess.CalledProcessError, ImportError) as error:
            raise SystemExit(
                "Python cannot make a virtual environment with pip here. On Debian and Ubuntu install the package "
                f"python3-venv, or name another Python: make PYTHON=/path/to/python3.11 ({error})"
            ) from error
        (HOME / ".made-for").write_text(str(ROOT))
    _say(f"Installing the packages of {LOCKS[level]} (once, until it changes)")
    _stamp(level).unlink(missing_ok=True)
    _pip("--require-hashes", "--requirement", LOCKS[level])
    _pip("--no-deps", "--no-build-isolation", "--editable", ".")
    # The development lock holds all of the runtime's.
    for done in {level, "runtime"}:
        _stamp(done).write_text(_digest(done))


def main() -> None:
    """Makes the environment of the level named on the command line."""
    if sys.version_info < OLDEST:
        found = ".".join(str(part) for part in sys.version_info[:2])
        raise SystemExit(f"Python 3.11 or newer is needed, this is {found}: make PYTHON=/path/to/python3.11")
    if len(sys.argv) != 2 or sys.argv[1] not in LOCKS:
        raise SystemExit(f"say which environment: {' or '.join(LOCKS)}")
    level = sys.argv[1]
    if _ready(level):
        return
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _ready(level):
            _install(level)


if __name__ == "__main__":
    main()

"""wrk, the load generator: an HTTP client in C, in a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw. Times in milliseconds."""

    requests: int
    per_second: float
    p50: float
    p99: float


def require_wrk() -> str:
    """The program's path; SystemExit saying how to get it where it is missing."""
    found = shutil.which("wrk")
    if found is None:
        raise SystemExit("wrk is needed for this benchmark and is not installed: on Debian and Ubuntu, apt install wrk")
    return found


def write_post(folder: Path, body: str) -> Path:
    """A script that makes wrk send `body` as JSON."""
    if "]==]" in body:
        raise ValueError("the body holds Lua's end of a long string")
    path = folder / "post.lua"
    path.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n' + f"wrk.body = [==[{body}]==]\n"
    )
    return path


def run(url: str, *, connections: int, seconds: float, headers: Mapping[str, str], script: Path | None = None) -> Load:
    """Loads `url` for a while. SystemExit where a reply was no 2xx or a connection failed."""
    command = [require_wrk(), "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency"]
    command += [f"-H{name}: {value}" for name, value in headers.items()]
    command += ["-s", str(script)] if script is not None else []
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=seconds + 30, check=False)
    text = done.stdout
    if done.returncode or "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"wrk at {url} failed:\n{text}{done.stderr}")
    return Load(
        requests=int(_found(r"(\d+) requests in", text)),
        per_second=float(_found(r"Requests/sec:\s+([\d.]+)", text)),
        p50=_milliseconds(_found(r"(?m)^\s+50%\s+(\S+)", text)),
        p99=_milliseconds(_found(r"(?m)^\s+99%\s+(\S+)", text)),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"wrk printed something unexpected:\n{text}")
    return match[1]


def _milliseconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text)
    if match is None:
        raise SystemExit(f"wrk printed an unexpected time: {text}")
    return float(match[1]) * _UNITS[match[2]]

"""System parts that some tests need: left out on a laptop that lacks them, required where CI is set."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

_PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-registry": "docker-registry",
    "busybox": "busybox-static",
    "ip": "iproute2",
    "iptables": "iptables",
    "nsenter": "util-linux",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "systemd-analyze": "systemd",
    "tmux": "tmux",
    "radosgw": "radosgw",
    "radosgw-admin": "ceph-common",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "monmaptool": "ceph-base",
    "setpriv": "util-linux",
}


def need(*programs: str, root: bool = False) -> None:
    """Returns where all of them are here. Else skips the test, or fails it where CI is set, and says why."""
    missing = [program for program in programs if found(program) is None]
    why = ""
    if missing:
        packages = dict.fromkeys(_PACKAGES.get(program, program) for program in missing)
        why = f"{', '.join(missing)} not found: apt-get install {' '.join(packages)}"
    elif root and os.geteuid() != 0:
        why = "only root may make network namespaces"
    _lacking(why)


def need_packages(*names: str) -> None:
    """Returns where Python has all of these packages; else as `need`."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    _lacking(f"{', '.join(missing)} not found: pip install {' '.join(missing)}" if missing else "")


def _lacking(why: str) -> None:
    if why:
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


def found(program: str) -> str | None:
    """Where a program is, or None. Daemons often lie in folders that are not on a user's PATH."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))

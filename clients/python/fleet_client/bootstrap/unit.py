"""The systemd unit of an agent. Pure."""

from __future__ import annotations

from collections.abc import Mapping

NAME = "fleet-agent.service"


def unit_text(folder: str, environment: Mapping[str, str], *, user: str | None) -> str:
    """The unit; `folder` is where `install` has put the release, `user` runs it (None: a unit of the user's own).

    The agent starts engines and containers and lets callers run programs, so it is not locked in; what it does not need
    it does not get. Its children end with it.
    """
    lines = [
        "[Unit]",
        "Description=Fleet Commander agent",
        "After=network-online.target docker.service",
        "Wants=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={_quoted(folder + '/current/bin/fleet')} agent --data-dir {_argument(folder + '/state')}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(environment.items())),
        "Restart=always",
        "RestartSec=5",
        "TimeoutStopSec=30",
        "KillMode=mixed",
        "UMask=0077",
        "LimitNOFILE=65536",
        "OOMPolicy=continue",
    ]
    lines += [f"User={user}"] if user is not None else []
    target = "multi-user.target" if user is not None else "default.target"
    return "\n".join([*lines, "", "[Install]", f"WantedBy={target}", ""])


def _quoted(text: str) -> str:
    """One word of a unit's line: quotes, backslashes and specifiers lose their meaning."""
    if any(letter in text for letter in "\n\r\0"):
        raise ValueError("must be one line")
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{plain}"'


def _argument(text: str) -> str:
    """The same for an argument of a program, where variables would be filled in: in its path and in Environment= they
    are not."""
    return _quoted(text).replace("$", "$$")

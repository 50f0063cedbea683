"""From a machine with SSH and Python to a node, step by step; each step finds out whether it was taken before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fleet_client.bootstrap.host import Bytes, Host, HostError
from fleet_client.bootstrap.unit import NAME, unit_text
from fleet_client.bootstrap.wheels import WheelSet

Step = Callable[[str], None]
OLDEST = (3, 11)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted. `environment` are FLEET_AGENT_* settings; `token` makes a join token where one is needed."""

    wheels: WheelSet
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    systemd: bool = True
    token: Callable[[], str | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it; `changed` names the steps that had to be taken."""

    node_id: str
    release: str
    changed: tuple[str, ...]


async def install(host: Host, plan: Plan, step: Step, sent: Bytes) -> Outcome:
    """Takes the steps. Raises HostError; then it may be begun again."""
    changed: list[str] = []
    about = json.loads(await _python(host, _ABOUT))
    _judge(about)
    folder = plan.folder or f"{about['home']}/.fleet-agent"
    release = f"{folder}/releases/{plan.wheels.digest}"
    step(f"bringing {len(plan.wheels.files)} wheels")
    if await host.bring(plan.wheels.files, f"{folder}/wheels", sent):
        changed.append("wheels")
    step("installing")
    if await _installed(host, plan, folder, release):
        changed.append("release")
    step("joining")
    if await _joined(host, plan, folder):
        changed.append("joined")
    step("starting")
    started = await (_by_systemd if plan.systemd else _by_hand)(host, plan, folder, about)
    changed += started
    node_id = (await _python(host, _NODE_ID, folder, plan.environment.get("FLEET_AGENT_NODE_ID", ""))).strip()
    return Outcome(node_id, plan.wheels.digest, tuple(changed))


def _judge(about: Mapping[str, object]) -> None:
    version = about["version"]
    if not isinstance(version, list) or tuple(version[:2]) < OLDEST:
        raise HostError(f"Python {'.'.join(map(str, OLDEST))} or newer is needed on the host, it has {version}")


async def _installed(host: Host, plan: Plan, folder: str, release: str) -> bool:
    """Makes the release's own environment beside the one that runs, and turns `current` to it at once."""
    names = "\n".join(path.name for path in plan.wheels.files)
    return (await host.script(_INSTALL, folder, release, given=names + "\n")).strip().endswith("changed")


async def _joined(host: Host, plan: Plan, folder: str) -> bool:
    known = await host.script('test -e "$1/state/identity.json" && echo yes || echo no', folder)
    if known.strip() == "yes":
        return False
    token = plan.token()
    if token is None:
        return False
    more = [f"{name}={value}" for name, value in sorted(plan.environment.items())]
    # The token goes in by standard input: arguments can be seen by everybody there.
    await host.script(_JOIN, folder, *more, given=token + "\n")
    return True


async def _by_systemd(host: Host, plan: Plan, folder: str, about: Mapping[str, object]) -> list[str]:
    if not about["systemd"]:
        raise HostError("systemd does not run on the host: start the agent without it, by --no-systemd")
    root = about["uid"] == 0
    text = unit_text(folder, plan.environment, user="root" if root else None)
    place = "/etc/systemd/system" if root else f"{about['home']}/.config/systemd/user"
    await host.run("mkdir", "-p", place)
    written = await host.write(f"{place}/{NAME}", text)
    control = ["systemctl"] if root else ["systemctl", "--user"]
    if written:
        await host.run(*control, "daemon-reload")
    if not root:
        await host.run("loginctl", "enable-linger", fine=(0, 1))
    await host.run(*control, "enable", NAME)
    running = await host.script(_RUNS, folder)
    if written or running.strip() != "current":
        await host.run(*control, "restart", NAME)
        return ["started"]
    return []


async def _by_hand(host: Host, plan: Plan, folder: str, about: Mapping[str, object]) -> list[str]:
    more = [f"{name}={value}" for name, value in sorted(plan.environment.items())]
    other = await host.write(f"{folder}/environment", "".join(f"{one}\n" for one in more), mode=0o600)
    if not other and (await host.script(_RUNS, folder)).strip() == "current":
        return []
    await host.script(_START, folder, *more)
    return ["started"]


async def _python(host: Host, text: str, *arguments: str) -> str:
    return await host.run("python3", "-c", text, *arguments)


_ABOUT = """
import json, os, platform, sys
print(json.dumps({
    "version": list(sys.version_info[:3]), "machine": platform.machine(), "home": os.path.expanduser("~"),
    "uid": os.getuid(), "systemd": os.path.isdir("/run/systemd/system"),
}))
"""
_NODE_ID = """
import json, re, socket, sys
try:
    with open(sys.argv[1] + "/state/identity.json") as stream:
        print(json.load(stream)["node_id"])
except FileNotFoundError:
    print(sys.argv[2] or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:63] or "node")
"""
_INSTALL = """
set -eu
umask 077
folder=$1 release=$2
if [ ! -e "$release/.whole" ]; then
  rm -rf "$release"
  mkdir -p "$folder/releases"
  python3 -m venv --without-pip "$release"
  set --
  while read -r name; do
    case $name in pip-*) pip=$folder/wheels/$name ;; *) set -- "$@" "$folder/wheels/$name" ;; esac
  done
  "$release/bin/python" "$pip/pip" install -q --no-index --no-deps --no-compile --disable-pip-version-check "$@" >&2
  : > "$release/.whole"
  echo changed
fi
if [ "$(readlink "$folder/current" || true)" != "$release" ]; then
  ln -sfn "$release" "$folder/current.new"
  mv -T "$folder/current.new" "$folder/current"
  echo changed
fi
"""
_JOIN = """
set -eu
umask 077
folder=$1
shift
read -r FLEET_AGENT_JOIN
export FLEET_AGENT_JOIN
exec env "$@" "$folder/current/bin/fleet" agent --join-only --data-dir "$folder/state" </dev/null
"""
_RUNS = """
pid=$(cat "$1/state/lock" 2>/dev/null) || pid=
if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null && grep -qs fleet "/proc/$pid/cmdline"; then
  release=$(readlink "$1/current")
  case $(tr '\\0' '\\n' < "/proc/$pid/cmdline" | head -n 1) in
    "$release"/bin/*) echo current ;;
    *) echo old ;;
  esac
else
  echo none
fi
"""
_START = """
set -eu
umask 077
folder=$1
shift
pid=$(cat "$folder/state/lock" 2>/dev/null || true)
# A process that has ended, and that nobody has taken notice of, has a number still, but no words.
runs() { [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null && grep -qs fleet "/proc/$pid/cmdline"; }
if runs; then
  kill "$pid"
  n=0
  while runs && [ $n -lt 900 ]; do sleep 0.1; n=$((n + 1)); done
  if runs; then
    echo "the agent that runs there does not end: end process $pid, then try again" >&2
    exit 1
  fi
fi
mkdir -p "$folder/state"
setsid env "$@" "$folder/current/bin/fleet" agent --data-dir "$folder/state" \
  </dev/null >>"$folder/agent.log" 2>&1 &
"""

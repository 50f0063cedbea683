"""Debian's docker-registry, for tests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.parts import need

USERNAME, PASSWORD = "fleet", "secret"
_HTPASSWD = "fleet:$2b$04$qo6wCA6nIDJw4sLGfLe9Te/Q7R2sKTfemkjzZPMhVWl8gpMySyE.S\n"
_CONFIG = """version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
{auth}"""


@contextmanager
def registry(folder: Path, address: str, *, login: bool = False, within: Sequence[str] = ()) -> Iterator[None]:
    """A registry on `address` that keeps its images in `folder`; two on one folder hold the same.

    With `login` it wants USERNAME and PASSWORD. `within` is the beginning of a command line that enters a namespace.
    """
    need("docker-registry", "curl")
    folder.mkdir(parents=True, exist_ok=True)
    name = address.replace(":", "-") + ("-login" if login else "")
    auth = ""
    if login:
        (folder / "htpasswd").write_text(_HTPASSWD)
        auth = f"auth: {{htpasswd: {{realm: fleet, path: {folder / 'htpasswd'}}}}}\n"
    config = folder / f"{name}.yml"
    config.write_text(_CONFIG.format(root=folder, address=address, auth=auth))
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*within, "docker-registry", "serve", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 100
        asked = [*within, "curl", "-s", f"http://{address}/v2/"]
        while subprocess.run(asked, check=False, capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < until, (folder / f"{name}.log").read_text()
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()

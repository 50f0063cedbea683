"""Times of the sketch engine on this machine: `python bench/sketch.py [--size 1024] [--steps 20]`.

Prints the median and range of five runs each of paint and PNG encoding, on one thread, for several scenes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fleet_agent.engines import png
from fleet_agent.engines.image import ImageRequest
from fleet_agent.engines.sketch.painter import paint
from fleet_agent.engines.sketch.style import combine, default_tensors

PROMPTS = (
    "a beautiful sunset over mountains",
    "cyberpunk city at night",
    "beautiful landscape",
    "stormy sea with a boat",
    "snowy forest in winter",
)
ROUNDS = 5


class _Quiet:
    def check(self) -> None:
        return None

    def step(self, done: int, picture: Callable[[], npt.NDArray[np.uint8]] | None) -> None:
        return None


def _show(name: str, seconds: list[float], size: int | None = None) -> None:
    median, low, high = (f(seconds) * 1000 for f in (statistics.median, min, max))
    kilobytes = "" if size is None else f"  {size / 1024:.0f} KiB"
    sys.stdout.write(f"  {name:<8}{median:8.1f} ms  [{low:.1f}-{high:.1f}]{kilobytes}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    style = combine(default_tensors(), [])
    for prompt in PROMPTS:
        paints: list[float] = []
        encodes: list[float] = []
        size = 0
        for _ in range(ROUNDS):
            request = ImageRequest(
                prompt, "blurry, bad quality", options.size, options.size, options.steps, 7.5, 7, "euler"
            )
            start = time.perf_counter()
            picture = paint(request, style, _Quiet())
            painted = time.perf_counter()
            size = len(png.encode(picture, {"prompt": prompt}))
            encodes.append(time.perf_counter() - painted)
            paints.append(painted - start)
        sys.stdout.write(f"{prompt} ({options.size}x{options.size}, {options.steps} steps)\n")
        _show("paint", paints)
        _show("png", encodes, size)


if __name__ == "__main__":
    main()

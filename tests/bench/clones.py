"""How much sooner a clone of a template answers than a guest that boots: python -m tests.bench.clones

Seconds from VM.start to the first answer of Health.Check (for a clone also with its identity, clock and random numbers
set), both in turn, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import image
from agent import client
from image.vm import VM, VMConfig
from image.vm.template import Template, says_ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    options = parser.parse_args()
    directory = image.Build(image.load(image.find("lean"), settings=["format=erofs"])).image().directory
    name = f"bench-{os.getpid()}"
    run = Path(tempfile.mkdtemp(prefix="caisson-", dir="/tmp"))
    os.environ["CAISSON_RUN"] = str(run)
    template = None
    try:
        saved = VMConfig(directory, name="s", memory=options.memory, savable=True)
        with VM.start(saved, ready=says_ready) as vm:
            vm.save(name)
        template = Template.load(name)
        assert template is not None
        booted = VMConfig(directory, name="b", memory=options.memory)
        clone = VMConfig.clone(template, name="c")
        answers = partial(client.answers, timeout=1.0)
        ways: dict[str, tuple[VMConfig, Callable[[Path], bool]]] = {
            "boot": (booted, answers),
            "clone": (clone, answers),
            "clone, settled": (clone, partial(client.settled, hostname="c")),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, (config, ready) in ways.items():
                began = time.monotonic()
                with VM.start(config, ready=ready):
                    seconds[way].append(time.monotonic() - began)
        for way, found in seconds.items():
            figures = {"median": statistics.median(found), "best": min(found), "worst": max(found)}
            print(json.dumps({"way": way, "rounds": len(found)} | {k: round(v, 3) for k, v in figures.items()}))
    finally:
        if template is not None:
            shutil.rmtree(template.directory)
        shutil.rmtree(run)


if __name__ == "__main__":
    main()

"""Measure, inside a guest, milliseconds from the start of `crun exec` or `runc exec` to the first byte of output.

    python -I -S runtimes.py ROOTFS CONFIG_JSON

Prints `ready`; then answers each input line, the name of a runtime, with a line: a number, or a word on why there is
none.  Standard library only.
"""

import json
import os
import shutil
import sys
import time

PLACE = "/run/caisson-bench"
OPTIONS = {"crun": ["--cgroup-manager=disabled"], "runc": []}


def call(words: list[str], output: int) -> int:
    """Run a command with this stdout; return its pid."""
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, output, 1)]
    return os.posix_spawn(words[0], words, os.environ, file_actions=actions)


class Runtime:
    """A runtime with a container in which to run programs."""

    def __init__(self, name: str, config: dict[str, object]) -> None:
        program = shutil.which(name)
        self.failure = "" if program else f"{name} is not in the image"
        bundle = f"{PLACE}/{name}"
        self._words = [program or "", "--root", f"{bundle}-state", *OPTIONS[name]]
        os.makedirs(bundle, exist_ok=True)  # noqa: PTH103 - no pathlib, which takes a while to import there
        with open(f"{bundle}/config.json", "w") as file:  # noqa: PTH123
            json.dump(config, file)
        # Not a pipe, because its output stays open in the container.
        with open(f"{bundle}/log", "wb") as log:  # noqa: PTH123
            run = ["run", "--detach", "--bundle", bundle, "bench"]
            if program and os.waitpid(call([*self._words, *run], log.fileno()), 0)[1]:
                self.failure = f"{name} run fails in the guest"

    def first_byte(self) -> str:
        """Measure one exec."""
        if self.failure:
            return self.failure
        here, there = os.pipe()
        began = time.perf_counter()
        pid = call([*self._words, "exec", "bench", "/bin/echo", "x"], there)
        os.close(there)
        first = os.read(here, 1)
        took = (time.perf_counter() - began) * 1000
        os.close(here)
        return str(took) if os.waitpid(pid, 0)[1] == 0 and first == b"x" else "exec fails in the guest"


def main() -> None:
    config = json.loads(sys.argv[2]) | {"root": {"path": sys.argv[1], "readonly": True}}
    runtimes = {name: Runtime(name, config) for name in OPTIONS}
    print("ready", flush=True)
    for line in sys.stdin:
        print(runtimes[line.strip()].first_byte(), flush=True)


main()

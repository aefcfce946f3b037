"""Support tests of the OCI command line: bundles, and a driver for ours or another runtime."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "commands" / "caisson-oci"
SECONDS = 60.0
OF_CONTAINERS = ("nsexec:", "sleep", "busybox", "sh", "true")


class Result:
    """The result of a command: its status and both outputs, without timestamps of log lines."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = re.sub(r'time="?[^ ]*"? ', "", err)

    def __repr__(self) -> str:
        return f"Result({self.status}, {self.out!r}, {self.err!r})"

    @property
    def message(self) -> str:
        """Return the message of the last error in the log."""
        found = re.findall(r"level=error msg=(.*)", self.err)
        return json.loads(found[-1]) if found else ""


class Oci:
    """A runtime with its own root; without a `front` the interpreter does everything."""

    def __init__(self, program: Path, root: Path, nsexec: Path, front: Path | None = None) -> None:
        self.program = program
        self.root = root
        self._env = {**os.environ, "CAISSON_NSEXEC": str(nsexec), "CAISSON_FRONT": str(front or "")}

    def argv(self, *args: str) -> list[str]:
        return [str(self.program), "--root", str(self.root), *args]

    def __call__(self, *args: str, stdin: str = "", env: dict[str, str] | None = None, **options: Any) -> Result:
        """Run a command to completion."""
        done = subprocess.run(
            self.argv(*args), input=stdin, capture_output=True, text=True, env={**self._env, **(env or {})},
            timeout=SECONDS, **options,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    def detached(self, *args: str, env: dict[str, str] | None = None, **options: Any) -> Result:
        """Run a command whose process keeps the streams: /dev/null, and a file for errors."""
        errors = self.root.parent / f"errors-{threading.get_ident()}"
        with errors.open("w") as err:
            done = subprocess.run(
                self.argv(*args), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err,
                env={**self._env, **(env or {})}, timeout=SECONDS, **options,
            )  # fmt: skip
        return Result(done.returncode, "", errors.read_text())

    def ok(self, *args: str, **options: Any) -> str:
        """Run a command that must succeed without error output; return its output."""
        result = self(*args, **options)
        assert (result.status, result.err) == (0, ""), result
        return result.out

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("state", name))
        return found

    def status(self, name: str) -> str:
        return str(self.state(name)["status"])

    def running(self, bundle: Path, name: str) -> int:
        """Run a container in the background; return its pid."""
        result = self.detached("run", "-d", "-b", str(bundle), name)
        assert result.status == 0, result
        return int(self.state(name)["pid"])

    def clear(self) -> None:
        """Delete all containers, and check that nothing is left."""
        if not self.root.exists():
            return
        for place in list(self.root.iterdir()):
            self("delete", "-f", place.name)
        assert list(self.root.iterdir()) == []


def bundle(directory: Path, rootfs: Path, *args: str, **process: Any) -> Path:
    """Create a bundle with a configuration as `spec` writes it, without a terminal."""
    directory.mkdir(exist_ok=True)
    config = directory / "config.json"
    config.unlink(missing_ok=True)
    subprocess.run([str(OURS), "spec", "-b", str(directory)], check=True)
    edit(
        directory, lambda value: value["process"].update({"terminal": False, "args": list(args) or ["true"], **process})
    )
    edit(directory, lambda value: value["root"].update({"path": str(rootfs)}))
    edit(directory, lambda value: value["process"].update({"env": ["PATH=/bin", "TERM=xterm"]}))
    return directory


def edit(directory: Path, change: Any) -> None:
    """Change a bundle's configuration."""
    config = directory / "config.json"
    value = json.loads(config.read_text())
    change(value)
    config.write_text(json.dumps(value))


def become_subreaper() -> None:
    """Make orphans of commands children of this process, as for every caller of a runtime."""
    from caisson.agent.base.syscalls import set_child_subreaper

    set_child_subreaper()


@contextlib.contextmanager
def reaping() -> Iterator[None]:
    """Reap continually what containers leave to this process; commands are waited for by whoever started them."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.005):
            reap()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def reap() -> None:
    """Reap exited processes of containers, and stages of nsexec."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
                if rest.split()[0] == "Z" and name.startswith(OF_CONTAINERS):
                    os.waitpid(int(pid), os.WNOHANG)


def cgroup_of(pid: int, controller: str) -> Path:
    """Return the cgroup of a process in a v1 hierarchy."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}")
    raise AssertionError(f"no cgroup of {controller}")

"""Kill every process of a VM's life, at random moments: nothing is left, and the next command works.

CAISSON_KILLS is the number of kills (3, so that CI takes a minute; 50 for the full run), and CAISSON_SEED selects them:
the same number makes the same choices.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from caisson.image.build.cache import default_root
from caisson.image.vm.accel import Host, choose_vsock
from tests.build.container_images import busybox_layer
from tests.component.fake_qemu import files_of, processes_of
from tests.e2e.conftest import COMPILE_TIMEOUT, Caisson, built
from tests.support.poll import wait_until
from tests.support.trees import unpacked

KILLS = int(os.environ.get("CAISSON_KILLS", "3"))
SEED = int(os.environ.get("CAISSON_SEED", str(random.randrange(10**6))))

pytestmark = [pytest.mark.vm, pytest.mark.timeout(COMPILE_TIMEOUT + 60 * KILLS)]

#: Whom to kill, by a part of each command line; the client is the command itself.
VICTIMS = {"client": "", "supervisor": "caisson.image.vm.supervisor", "qemu": "qemu-system-", "vsock": "/vsock/"}

#: Seconds for all others to notice, on a busy machine.
NOTICE_TIMEOUT = 60.0


@dataclass(frozen=True)
class Scene:
    """A command during which a process is killed.

    It prints ``up`` once it runs until EOF on its input (or SIGINT, if it does not read input); without ``up``, it ends
    by itself.  ``vm``: it needs the VM `v`, and leaves it alone.  ``undo`` reverts its effects.
    """

    words: tuple[str, ...]
    up: bytes = b""
    interrupt: bool = False
    vm: bool = True
    undo: tuple[str, ...] = ()


STAYS = ("sh", "-c", "echo u''p; cat")

SCENES = {
    "boot": Scene(("boot-vm", "--name", "v"), b"the agent answers", interrupt=True, vm=False),
    "boot, detached": Scene(("boot-vm", "--name", "v", "--detach"), vm=False),
    "exec in a VM of its own": Scene(("exec", "--", *STAYS), b"up\n", vm=False),
    "save a snapshot": Scene(("save-snapshot", "--name", "SNAPSHOT", "--memory", "192"), vm=False),
    "clone": Scene(("boot-vm", "--snapshot", "SNAPSHOT", "--name", "v", "--detach"), vm=False),
    "exec": Scene(("exec", "--name", "v", "--", *STAYS), b"up\n"),
    "run": Scene(("run", "ROOT", "--name", "v", "--", *STAYS), b"up\n"),
    "shell": Scene(("shell", "--name", "v"), b"up\n"),
    "cp there": Scene(("cp", "ROOT", "default:/tmp", "--name", "v")),
    "cp back": Scene(("cp", "default:/bin/busybox", "COPY", "--name", "v")),
    "share": Scene(("share", "ROOT", "--name", "v"), undo=("unshare", "root", "--name", "v")),
    "forward": Scene(("forward", "0:vsock:1024", "--name", "v"), b"vsock port", interrupt=True),
    "stop": Scene(("stop-vm", "--name", "v")),
}

#: Steps of the cache in which these commands work.
STEPS = ("containers", "snapshots")


class Stage:
    """Where scenes are played: a command line with its own directories for everything a command may leave."""

    def __init__(self, caisson: Caisson, place: Path) -> None:
        self.snapshot = f"kills-{os.getpid()}"
        self._caisson = caisson
        self._run = caisson.run_directory
        self._scratch = place / "tmp"
        self._scratch.mkdir()
        caisson.environment |= {"TMPDIR": str(self._scratch)}
        unpacked(busybox_layer(), place / "root")
        self._names = {"SNAPSHOT": self.snapshot, "ROOT": str(place / "root"), "COPY": str(place / "copy")}
        self._took: dict[str, float] = {}

    def play(self, name: str, victim: str, when: float) -> None:
        """Kill one process of a scene, ``when`` of the way through it; then complete the scene."""
        scene = SCENES[name]
        if name not in self._took:
            self._play_undisturbed(name)
        self._prepare(scene)
        moment = when * self._took[name]
        print(f"{name}: {victim} after {moment:.2f} of {self._took[name]:.2f} s", flush=True)
        with self._started(scene) as command:
            time.sleep(moment)  # the moment is what is tested
            wait_until(lambda: self._kill(victim, command) or command.poll() is not None, f"{victim} is running")
            command.wait(NOTICE_TIMEOUT)
            assert command.stdout is not None
            said = command.stdout.read().decode(errors="replace")
        assert "Traceback" not in said, said
        assert command.returncode in ((-signal.SIGKILL, 0) if victim == "client" else (0, 1, 125)), said
        if victim == "client" and scene.vm and name != "stop":
            assert self._vms() == ["v"]
        else:
            if victim == "client" or command.returncode == 0:  # whether a VM exists now is a matter of chance
                self._do("stop-vm", "--all")
            self._nothing_left()
        self._play_undisturbed(name)

    def _play_undisturbed(self, name: str) -> None:
        """Play a scene undisturbed."""
        scene = SCENES[name]
        self._prepare(scene)
        began = time.monotonic()
        with self._started(scene) as command:
            assert command.stdout is not None
            said = b""
            while scene.up not in said or not scene.up:
                line = command.stdout.readline()
                said += line
                if not line:
                    break
            self._took[name] = time.monotonic() - began
            if scene.up and scene.interrupt:
                command.send_signal(signal.SIGINT)
            rest, _ = command.communicate(timeout=NOTICE_TIMEOUT)
        assert command.returncode == (130 if scene.interrupt else 0), (said + rest).decode(errors="replace")
        assert scene.up in said, said
        if scene.undo:
            self._do(*scene.undo)
        if not scene.vm or name == "stop":
            self._do("stop-vm", "--all")
            self._nothing_left()
        else:
            assert self._vms() == ["v"]
        assert list(self._scratch.iterdir()) == []
        assert [str(stale) for step in STEPS for stale in stale_work(default_root() / step)] == []

    def _prepare(self, scene: Scene) -> None:
        """Start the VM that a scene needs, or make sure there is none."""
        lives = self._vms() == ["v"]
        if scene.vm and not lives:
            self._do("boot-vm", "--name", "v", "--detach")
            self._do("exec", "--name", "v", "--", "true")
        elif lives and not scene.vm:
            self._do("stop-vm", "--name", "v")
        if "--snapshot" in scene.words and not (default_root() / "snapshots" / self.snapshot).exists():
            self._play_undisturbed("save a snapshot")

    @contextlib.contextmanager
    def _started(self, scene: Scene) -> Iterator[subprocess.Popen[bytes]]:
        words = [self._names.get(word, word) for word in scene.words]
        pipe = subprocess.PIPE
        with self._caisson.start(*words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as command:
            assert command.stdin is not None
            if scene.words[0] == "shell":
                command.stdin.write(b"echo u''p\n")
                command.stdin.flush()
            try:
                yield command
            finally:
                command.kill()

    def _kill(self, victim: str, command: subprocess.Popen[bytes]) -> bool:
        """Kill a process; return whether there was one to kill."""
        if victim == "client":
            command.kill()
            return True
        hit = False
        for pid, line in processes_of(self._run).items():
            if VICTIMS[victim] in line and "setpriv" not in line and "--version" not in line:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hit = True
        return hit

    def _vms(self) -> list[str]:
        return [one["name"] for one in json.loads(self._do("list-vms", "--json"))]

    def _do(self, *words: str) -> bytes:
        done = self._caisson(*words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def _nothing_left(self) -> None:
        wait_until(lambda: not files_of(self._run), "no file is left", NOTICE_TIMEOUT, lambda: files_of(self._run))
        wait_until(lambda: not processes_of(self._run), "no process", NOTICE_TIMEOUT, lambda: processes_of(self._run))


def stale_work(step: Path) -> Iterator[Path]:
    """Return unfinished work in the cache whose owner is dead."""
    for making in step.glob(".making-*"):
        lock = making.with_name(f".lock-{making.name.removeprefix('.making-')}")
        with contextlib.suppress(FileNotFoundError, BlockingIOError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if making.exists():
                yield making


@pytest.fixture
def stage(own: Caisson, tmp_path: Path) -> Iterator[Stage]:
    built("--template", "lean", "--set", "format=erofs")  # needed for snapshots: it may have to be compiled
    stage = Stage(own, tmp_path)
    try:
        yield stage
    finally:
        own("stop-vm", "--all")
        shutil.rmtree(default_root() / "snapshots" / stage.snapshot, ignore_errors=True)


def test_killed_at_any_moment(stage: Stage) -> None:
    print(f"CAISSON_KILLS={KILLS} CAISSON_SEED={SEED}")
    chance = random.Random(SEED)
    pairs = [(scene, victim) for scene in SCENES for victim in VICTIMS]
    if choose_vsock("auto", Host.current()).name == "user":  # then a guest is saved without one
        pairs.remove(("save a snapshot", "vsock"))
    chance.shuffle(pairs)
    for scene, victim in itertools.islice(itertools.cycle(pairs), KILLS):
        stage.play(scene, victim, chance.uniform(0, 1.2))

"""Kill every process of a VM at any moment: no process, socket or directory is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caisson.image.vm import VM, VMConfig, VMError, find_vm, list_vms
from tests.component.fake_qemu import install, lives, make_image, nothing_left, processes_of
from tests.support.poll import wait_until

ROOT = Path(__file__).resolve().parents[2]

STARTER = """
import sys, time
from pathlib import Path
from caisson.image.vm import VM, VMConfig
vm = VM.start(VMConfig(Path(sys.argv[1]), name='v', accel='tcg', vsock='user'), ready=lambda socket: True)
print('up', flush=True)
time.sleep(1000)
"""

#: A guest that is started, then detached and stopped, saved as a snapshot, or cloned from one.
LIFE = """
import sys
from pathlib import Path
from caisson.image.vm import VM, VMConfig, find_vm
from caisson.image.vm.snapshot.snapshot import Snapshot
image, life = Path(sys.argv[1]), sys.argv[2]
if life == 'clone':
    config = VMConfig.clone(Snapshot.named('t'), name='v', accel='tcg', vsock='user')
else:
    config = VMConfig(image, name='v', accel='tcg', vsock='user', savable=life == 'save')
with VM.start(config, ready=lambda _: True) as vm:
    if life == 'save':
        vm.save('t')
    else:
        vm.detach()
        find_vm('v').stop()
"""

#: Kills of each party in each life, at moments chosen from the seed.
ROUNDS = 4
SEED = os.environ.get("CAISSON_SEED") or str(random.randrange(10**6))


def life_of(image: Path, life: str) -> list[str]:
    return [sys.executable, "-c", LIFE, str(image), life]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "r"))
    monkeypatch.setenv("CAISSON_CACHE", str(tmp_path / "cache"))
    return make_image(tmp_path / "image", "qmp")


def start(image: Path) -> VM:
    return VM.start(VMConfig(image, name="v", accel="tcg", vsock="user"), ready=lambda _: True)


@pytest.mark.parametrize("part", ["supervisor", "qemu", "vsock"])
def test_a_killed_part_takes_everything_with_it(image: Path, tmp_path: Path, part: str) -> None:
    vm = start(image)
    vm.detach()
    pids = vm.info["pids"]
    os.kill(pids[part], signal.SIGKILL)
    nothing_left(tmp_path / "r")
    for pid in pids.values():
        wait_until(lambda gone=pid: not lives(gone))  # type: ignore[misc]
    again = start(image)  # the name is free
    again.stop()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("supervisor", "its supervisor died"),
        ("qemu", "QEMU was killed by signal 9"),
        ("vsock", "the vsock device was killed by signal 9"),
    ],
)
def test_the_starter_hears_what_was_killed(image: Path, tmp_path: Path, part: str, words: str) -> None:
    with start(image) as vm:
        os.kill(vm.info["pids"][part], signal.SIGKILL)
        with pytest.raises(VMError, match=words):
            vm.wait()
    nothing_left(tmp_path / "r")


def test_a_killed_starter_takes_its_vm_with_it(image: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER, image], cwd=ROOT, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        assert [vm.name for vm in list_vms()] == ["v"]
        starter.kill()
    nothing_left(tmp_path / "r")


def killed(image: Path, run: Path, life: str, victim: str, moment: float) -> None:
    """Kill one party, ``moment`` seconds into a life; however far it got, nothing is left."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(life_of(image, life), cwd=ROOT, stdout=quiet, stderr=quiet) as starter:

        def victims() -> list[int]:
            if victim == "starter":
                return [starter.pid]
            return [pid for pid, line in processes_of(run).items() if victim in line and "janitor" not in line]

        wait_until(lambda: victims() or starter.poll() is not None)
        time.sleep(moment)  # the moment is the point of the test
        for pid in victims():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        starter.wait(30)
    if victim == "starter" and (vm := find_vm("v")):  # it may already have been detached
        vm.stop()
    nothing_left(run)


@pytest.mark.parametrize("victim", ["starter", "caisson.image.vm.supervisor", "vhost_user", "qemu-system"])
@pytest.mark.parametrize("life", ["stop", "save", "clone"])
def test_killed_at_any_moment(image: Path, tmp_path: Path, life: str, victim: str) -> None:
    print(f"CAISSON_SEED={SEED}")
    chance = random.Random(f"{SEED} {life} {victim}")
    if life == "clone":
        subprocess.run(life_of(image, "save"), cwd=ROOT, check=True)
    for _ in range(ROUNDS):
        began = time.monotonic()
        subprocess.run(life_of(image, life), cwd=ROOT, check=True)  # and it works after each kill, too
        took = time.monotonic() - began
        assert list((tmp_path / "cache/snapshots").glob(".[lm]*")) == []
        killed(image, tmp_path / "r", life, victim, chance.uniform(0, took))


def test_two_starts_of_one_name_and_a_look_at_all_times(image: Path, tmp_path: Path) -> None:
    """Of several that request a name at once, one gets it; those that clean up meanwhile take nothing from it."""
    program = STARTER.replace("time.sleep(1000)", "sys.stdin.read()")
    words = [sys.executable, "-c", program, str(image)]
    for _ in range(4):
        pipe = subprocess.PIPE
        starters = [
            subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)
        ]
        try:
            while sum(starter.poll() is not None for starter in starters) < 2:
                list_vms()
            (winner,) = (starter for starter in starters if starter.poll() is None)
            assert winner.stdout is not None
            assert winner.stdout.readline() == "up\n"
            vm = find_vm("v")
            assert vm is not None
            assert (vm.directory / "lock").exists()
            for loser in starters:
                if loser is not winner:
                    assert loser.stderr is not None
                    assert "VM 'v': is running already" in loser.stderr.read()
        finally:
            for starter in starters:
                starter.communicate("")
        nothing_left(tmp_path / "r")

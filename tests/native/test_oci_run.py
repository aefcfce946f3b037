"""Test `run` of the OCI command line: options, orphans, signals, and its exit status.  Source: runc-run(8)."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.native.oci_support import Oci, bundle, edit

pytestmark = pytest.mark.root
NAME = f"oci-run-{os.getpid()}"


@pytest.mark.parametrize("option", ["--no-pivot", "--no-new-keyring", "--no-subreaper"])
def test_options_of_run(oci: Oci, tmp_path: Path, busybox_rootfs: Path, option: str) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "echo", "out")
    assert oci.ok("run", option, "-b", str(made), NAME) == "out\n"


def test_run_adopts_orphans(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    """Those of a container in the host's pid namespace: its parent could not wait for them."""
    orphan = "sleep 0.3; grep PPid /proc/$$/status"
    script = f"sh -c \"sh -c '{orphan}' &\"; sleep 1"
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", script.replace("$", "\\$"))
    edit(made, lambda value: value["linux"].update(namespaces=[{"type": "mount"}, {"type": "uts"}]))
    edit(made, lambda value: value.update(hostname=""))
    argv = oci.argv("run", "-b", str(made), NAME)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=oci._env) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == f"PPid:\t{runner.pid}\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
def test_run_passes_signals_on(oci: Oci, tmp_path: Path, busybox_rootfs: Path, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", script)
    argv = oci.argv("run", "-b", str(made), NAME)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=oci._env) as runner:
        assert runner.stdout is not None and runner.stdout.readline() == "ready\n"
        runner.send_signal(number)
        assert (runner.stdout.read(), runner.wait(20)) == ("got\n", 9)


def test_a_signal_that_ends_the_process_is_the_status(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    """Not pid 1, which its own SIGKILL does not end."""
    made = bundle(tmp_path / "b", busybox_rootfs, "sleep", "1000")
    oci.running(made, NAME)
    assert oci("exec", NAME, "sh", "-c", "kill -KILL $$").status == 137
    edit(made, lambda value: value["process"].update(args=["sh", "-c", "kill -TERM $$"]))
    edit(made, lambda value: value["linux"].update(namespaces=[{"type": "mount"}, {"type": "uts"}]))
    assert oci("run", "-b", str(made), f"{NAME}-2").status == 143

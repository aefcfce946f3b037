"""Test the commands for running containers: ps, stats, kill, pause, resume, rm."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.e2e.conftest import Caisson
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


def run(vm: Caisson, *words: str) -> bytes:
    done = vm(*words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def listed(vm: Caisson, command: str, *options: str) -> dict[str, Any]:
    return {one["container"]: one for one in json.loads(run(vm, command, "--json", *options))}


def test_container_life_cycle(vm: Caisson) -> None:
    vm.make_containers("days", "days-2")
    run(vm, "exec", "--container", "days", "--", "sh", "-c", "sleep 4242 & echo $!")
    run(vm, "exec", "--container", "days-2", "--", "true")

    found = listed(vm, "ps")
    assert {"days", "days-2"} <= found.keys()
    (sleeping,) = [one for one in found["days"]["processes"] if one["command"] == "sleep 4242"]
    assert sleeping["pid"] > 1 and sleeping["uid"] == 0
    assert listed(vm, "ps", "--container", "days").keys() == {"days"}
    lines = run(vm, "ps", "--container", "days").decode().splitlines()
    assert lines[0].split() == ["container", "status", "uid", "pid", "ppid", "cpu", "started", "tty", "time", "command"]
    assert any(line.split()[:2] == ["days", "running"] and line.endswith("sleep 4242") for line in lines)

    used = listed(vm, "stats", "--container", "days", "--interval", "0.2")["days"]
    assert used["pids"] == len(found["days"]["processes"]) and used["memory"] > 0 and used["cpu_seconds"] > 0

    run(vm, "pause", "days")
    refused = vm("exec", "--container", "days", "--", "true")
    assert refused.returncode == 125 and b"paused" in refused.stderr
    assert vm("pause", "days").returncode == 1
    statuses = {name: one["status"] for name, one in listed(vm, "ps").items()}
    assert (statuses["days"], statuses["days-2"]) == ("paused", "running")
    run(vm, "resume", "days")
    run(vm, "exec", "--container", "days", "--", "true")

    run(vm, "kill", "days")  # its init exits at SIGTERM, and with it the container
    wait_until(lambda: listed(vm, "ps", "--all")["days"]["exit_status"] == 0, "it ends")
    assert "days" not in listed(vm, "ps")
    assert listed(vm, "ps", "--all")["days"]["status"] == "stopped"
    assert any(line.endswith("exited with status 0") for line in run(vm, "ps", "-a").decode().splitlines())
    run(vm, "kill", "days-2", "--signal", "9", "--all")
    wait_until(lambda: listed(vm, "ps", "--all")["days-2"]["exit_status"] == 137, "it ends")
    run(vm, "rm", "days")
    run(vm, "rm", "days-2")
    assert not {"days", "days-2"} & listed(vm, "ps", "--all").keys()


@pytest.mark.parametrize(
    "command",
    ["kill", "rm", "pause", "resume", "start", "wait", "attach", "logs", "ps --container", "stats --container"],
)
def test_a_container_that_is_not_there(vm: Caisson, command: str) -> None:
    done = vm(*command.split(), "nobody")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert b"container nobody: does not exist; list them: caisson ps --all" in done.stderr


def test_a_vm_that_is_not_there(vm: Caisson) -> None:
    done = vm("ps", "--name", "nowhere")
    assert done.returncode == 1
    assert done.stderr == (
        b"caisson: VM 'nowhere': is not running; running: default; start it: caisson boot-vm nowhere --detach\n"
    )


@pytest.mark.parametrize("command", ["ps", "stats", "kill", "rm", "start", "pause", "resume"])
def test_help_has_an_example(caisson: Caisson, command: str) -> None:
    done = caisson(command, "--help")
    assert done.returncode == 0
    assert f"  caisson {command}" in done.stdout.decode().partition("Example")[2]


def test_closed_pipe_ends_a_command_quietly(caisson: Caisson) -> None:
    """`caisson ps --help | head -1`: no traceback."""
    for words in (("ps", "--help"), ("list-vms", "--json")):
        reading, writing = os.pipe()
        os.close(reading)
        with caisson.start(*words, stdout=writing, stderr=subprocess.PIPE) as command:
            os.close(writing)
            _, said = command.communicate()
        assert (command.returncode, said) == (141, b"")

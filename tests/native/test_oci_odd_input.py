"""Test odd configurations and arguments: each is rejected with one line, or accepted as by runc."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.native.oci_support import Oci, bundle, cgroup_of, edit

pytestmark = pytest.mark.root
NAME = f"oci-odd-{os.getpid()}"


#: Values of a wrong type, or without meaning, by field of config.json: each is rejected with one line.
ODD_VALUES: list[tuple[str, object]] = [
    *((field, value) for field in ("process", "root", "linux", "hooks") for value in ("x", 7, True, ["x"])),
    *((field, odd) for field in ("mounts", "linux.namespaces", "linux.devices") for odd in ("x", 7, True, {"a": 1})),
    *((f"process.{name}", value) for name in ("env", "rlimits", "args", "cwd") for value in (7, True, [7])),
    *((f"process.{name}", value) for name in ("capabilities", "user") for value in ("x", 7, [7])),
    *((f"linux.resources.{name}", value) for name in ("devices", "memory", "cpu", "pids") for value in ("x", 7, [7])),
    ("process.capabilities", {"bounding": [{}]}), ("process.capabilities", {"bounding": [7]}),
    ("process.rlimits", [None]), ("process.rlimits", ["x"]),
    ("hostname", "\ud800"), ("process.args", ["echo", "\ud83d", "\ude00"]), ("annotations", {"\udc00": "x"}),
    ("linux.resources.devices", [{}]), ("linux.resources", "x"), ("linux.seccomp", "x"), ("annotations", "x"),
]  # fmt: skip


def test_odd_values_of_a_configuration_are_refused_in_a_line(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    file = made / "config.json"
    good = file.read_text()
    for field, odd in ODD_VALUES:
        value = json.loads(good)
        at = value
        *around, last = field.split(".")
        for name in around:
            at = at.setdefault(name, {})
        at[last] = odd
        file.write_text(json.dumps(value))
        result = oci("run", "-b", str(made), NAME)
        assert result.status == 1 and len(result.err.splitlines()) == 1, (field, odd, result)
        assert "please report this" not in result.err, (field, odd, result)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{", "7", '"x"', "{} x"])
def test_a_configuration_that_is_none_is_refused_in_a_line(
    oci: Oci, tmp_path: Path, busybox_rootfs: Path, text: str
) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    (made / "config.json").write_text(text)
    result = oci("create", "-b", str(made), NAME)
    assert result.status == 1 and len(result.err.splitlines()) == 1 and "please report" not in result.err


def test_exec_with_an_odd_configuration_is_refused_in_a_line(oci: Oci, sleeper: Path) -> None:
    """The bundle's config.json may have changed since the container was created."""
    oci.running(sleeper, NAME)
    options = ("-u", "1", "-g", "1", "-e", "A=b", "-c", "CAP_KILL")
    for name, odd in (("user", 7), ("env", "x"), ("capabilities", "x"), ("rlimits", 7), ("cwd", 7)):
        edit(sleeper, lambda value, name=name, odd=odd: value["process"].update({name: odd}))
        result = oci("exec", *options, NAME, "true")
        assert result.status == 255 and len(result.err.splitlines()) == 1 and "please report" not in result.err, name
        edit(sleeper, lambda value, name=name: value["process"].update({name: {"cwd": "/"}.get(name)}))


def test_what_runc_takes_and_a_reader_of_the_specification_would_not(oci: Oci, sleeper: Path) -> None:
    """Found by comparison with runc 1.1.5 and 1.5.3."""
    edit(sleeper, lambda value: value["linux"].update(uidMappings=[{"containerID": 0, "hostID": 9, "size": 1}]))
    oci.running(sleeper, NAME)  # maps without a user namespace
    for text in ("null", "{}", '{"memory": {"kernel": 1048576}}', '{"pids": null}'):
        assert oci("update", "-r", "-", NAME, stdin=text).status == 0, text
    oci.ok("update", "--pids-limit", "010", NAME)
    assert (cgroup_of(int(oci.state(NAME)["pid"]), "pids") / "pids.max").read_text() == "8\n"
    assert oci.ok("kill", NAME, "0", "--all") == ""  # an option after operands
    assert oci("kill", NAME, "-1").message == 'unknown signal "-1"'
    oci.ok("kill", NAME, "+0")
    assert oci.ok("list", "-q", "-f", "nothing") == f"{NAME}\n"
    oci.ok("events", "--stats", "--interval", "+1m.5s", NAME)
    oci.ok("pause", NAME)
    assert oci("start", NAME).message == "cannot start a container in the paused state"
    oci.ok("resume", NAME)
    assert oci("exec", "--nope", NAME, "true").status == 1  # not 255: it was not attempted
    status = oci.ok("exec", "--no-new-privs=false", "--preserve-fds", "-1", NAME, "cat", "/proc/self/status")
    assert "NoNewPrivs:\t0" in status  # although the first process has it
    empty = oci("exec", NAME, "")
    assert (
        empty.message == 'exec failed: unable to start container process: exec: "": executable file not found in $PATH'
    )
    oci.ok("kill", NAME, "")  # SIGTERM

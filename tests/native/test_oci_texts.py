"""Texts that callers of the OCI command line match, each brought about: errors, warnings and lines of the debug log."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.runtime.verbs import VERBS
from tests.native.oci_support import Oci, bundle, cgroup_of, edit

pytestmark = [pytest.mark.root, pytest.mark.parametrize("oci", ["front"], indirect=True)]
NAME = f"oci-text-{os.getpid()}"
CANNOT = "runc run failed: unable to start container process: "


def change(made: Path, **fields: Any) -> None:
    """Change objects of a configuration."""
    edit(made, lambda value: [value[name].update(field) for name, field in fields.items()])


def test_a_cgroup_that_is_in_use_or_frozen(oci: Oci, sleeper: Path) -> None:
    change(sleeper, linux={"cgroupsPath": f"/{NAME}"})
    freezer = cgroup_of(oci.running(sleeper, NAME), "freezer")
    other = oci.detached("run", "-d", "-b", str(sleeper), "other").message
    assert (
        other.startswith(f"{CANNOT}unable to apply cgroup configuration: ") and "cgroup is not empty: 1 proc" in other
    )
    oci.ok("delete", "-f", NAME)
    freezer.mkdir()
    (freezer / "freezer.state").write_text("FROZEN")
    try:
        result = oci.detached("run", "-d", "-b", str(sleeper), NAME)
        assert result.status == 1 and "container's cgroup unexpectedly frozen" in result.message
    finally:
        (freezer / "freezer.state").write_text("THAWED")
        freezer.rmdir()


def test_sub_cgroups_that_cannot_be_joined(oci: Oci, sleeper: Path) -> None:
    pid = oci.running(sleeper, NAME)
    missing = oci("exec", "--cgroup", "missing", NAME, "true")
    assert missing.status == 255 and missing.message.startswith(
        "exec failed: unable to start container process: error "
    )
    assert "error adding pid" in missing.message and "no such file or directory" in missing.message
    (line,) = (one for one in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if one.startswith("0::"))
    unified = Path(f"/sys/fs/cgroup/unified{line.removeprefix('0::')}")
    (unified / "leaf").mkdir()
    (unified / "leaf" / "cgroup.procs").write_text(str(pid))
    (unified / "cgroup.subtree_control").write_text(f"+{(unified / 'cgroup.controllers').read_text().split()[0]}")
    busy = oci("exec", "--cgroup", "/", NAME, "true")  # there is nothing to fall back on where it was named
    assert busy.status == 255 and busy.message.endswith("device or resource busy")
    oci.ok("exec", NAME, "true")


UNIFIED = {"linux": {"resources": {"unified": {"memory.high": "1"}}}}
DEADLINE = {"policy": "SCHED_DEADLINE", "runtime": 42000, "deadline": 90000, "period": 1000000}
SOME_CPUS = {"linux": {"resources": {"cpu": {"cpus": "0"}}}, "process": {"scheduler": DEADLINE}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (UNIFIED, "invalid configuration: cannot use unified on cgroup v1"),
    (SOME_CPUS, "process scheduler can't be used together with AllowedCPUs"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=["unified", "scheduler"])
def test_configurations_that_this_machine_cannot_take(
    oci: Oci, sleeper: Path, fields: dict[str, Any], message: str
) -> None:
    if "scheduler" in message and (os.cpu_count() or 1) < 2:
        pytest.skip("one CPU is all CPUs")
    change(sleeper, **fields)
    result = oci.detached("run", "-d", "-b", str(sleeper), NAME)
    assert result.status == 1 and message in result.message, result
    assert oci.ok("list", "-q") == ""


def test_ambient_capabilities_that_are_not_inheritable_are_a_warning(
    oci: Oci, tmp_path: Path, busybox_rootfs: Path
) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "grep", "CapAmb", "/proc/self/status")
    sets = {name: ["CAP_KILL", "CAP_CHOWN"] for name in ("bounding", "effective", "permitted", "ambient")}
    change(made, process={"capabilities": {**sets, "inheritable": ["CAP_CHOWN"]}})
    result = oci("run", "-b", str(made), NAME)
    assert (result.status, result.out.split()) == (0, ["CapAmb:", "0000000000000001"])
    assert "level=warning msg=\"can't raise ambient capability CAP_KILL: " in result.err


def test_the_debug_log_of_run_and_exec(oci: Oci, sleeper: Path, tmp_path: Path) -> None:
    log, process = tmp_path / "log", tmp_path / "process.json"
    oci.detached("--debug", "--log", str(log), "--log-format", "json", "run", "-d", "-b", str(sleeper), NAME)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert '"level":"debug"' in log.read_text() and all(line.keys() == {"level", "msg", "time"} for line in lines)
    assert any(line["msg"].startswith("runc exeseal: using /proc/self/exe clone") for line in lines)
    process.write_text(
        json.dumps({"args": ["/bin/true"], "cwd": "/", "execCPUAffinity": {"initial": "0", "final": "0"}})
    )
    result = oci("--debug", "exec", "-p", str(process), NAME)
    assert result.status == 0 and "setns_init: about to exec" in result.err
    assert "affinity: 0x1" in result.err


def test_formats_of_logs(oci: Oci) -> None:
    assert oci("--log-format", "xml", "list").message == "invalid log-format: xml"


def test_names_of_descriptors_are_not_passed_on(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "env")
    argv = ["sh", "-c", 'export LISTEN_PID=$$; exec "$@" 3</dev/null', "sh", *oci.argv("run", "-b", str(made), NAME)]
    env = {**oci._env, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
    out = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, check=True).stdout
    assert {"LISTEN_FDS=1", "LISTEN_PID=1"} <= set(out.splitlines()) and "LISTEN_FDNAMES" not in out


@pytest.mark.parametrize("verb", ["checkpoint", "restore"])
def test_every_option_of_checkpoints_is_taken_and_the_command_refused_by_name(oci: Oci, verb: str) -> None:
    for option in VERBS[verb].options:
        value = {"flag": [], "number": ["1"]}.get(option.kind, ["x"])
        result = oci(verb, f"--{option.name}", *value, NAME)
        assert result.status == 1 and result.message.startswith(f"{verb}: not supported"), (option.name, result)
    known = {option.name for option in VERBS[verb].options}
    both = (
        "image-path work-path tcp-established tcp-skip-in-flight link-remap ext-unix-sk shell-job lazy-pages file-locks"
    )
    assert {*both.split(), "manage-cgroups-mode", "empty-ns", "auto-dedup"} <= known
    own = {
        "checkpoint": {"parent-path", "leave-running", "status-fd", "page-server", "pre-dump"},
        "restore": {"bundle", "detach", "no-subreaper", "lsm-profile", "lsm-mount-context"},
    }
    assert own[verb] <= known


def test_a_weight_of_block_io(oci: Oci, sleeper: Path) -> None:
    directory = cgroup_of(oci.running(sleeper, NAME), "blkio")
    files = [path for name in ("blkio.weight", "blkio.bfq.weight") if (path := directory / name).exists()]
    if not files:
        pytest.skip("this kernel has no weights of block I/O")
    oci.ok("update", "--blkio-weight", "150", NAME)
    assert [path.read_text().split()[-1] for path in files] == ["150"] * len(files)

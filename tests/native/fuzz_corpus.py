"""Provide the fuzzers' initial corpus: real messages and files of rich configurations, and known bad ones."""

from __future__ import annotations

import tempfile
from pathlib import Path
from struct import pack
from typing import Any

from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.spec import IdMapping, Spec
from caisson.agent.libcontainer.container import Container
from caisson.agent.libcontainer.plan import plan, wire
from caisson.agent.libcontainer.state import State
from caisson.agent.runtime import prepared
from tests.native.nsexec_support import config
from tests.native.test_nsexec_messages import BAD

#: An input starts with the kind of plan that follows.
INIT, EXEC = b"\0", b"\1"


def rich() -> dict[str, Any]:
    """Return a configuration that uses nearly every feature."""
    value = config("sh", "-c", "true", cwd="/tmp", noNewPrivileges=True, oomScoreAdj=100)
    value["process"] |= {
        "user": {"uid": 7, "gid": 8, "additionalGids": [1, 2, 3], "umask": 0o27},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
        "scheduler": {"policy": "SCHED_BATCH", "nice": 3},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 1},
        "execCPUAffinity": {"initial": "0-70", "final": "1"},
    }
    value["domainname"] = "example"
    value["root"]["readonly"] = True
    value["mounts"] += [
        {"destination": "/mnt", "type": "bind", "source": "/tmp", "options": ["rbind", "rro", "rslave", "nosuid"]},
        {
            "destination": "/data",
            "type": "bind",
            "source": "/tmp",
            "options": ["ridmap", "remount"],
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
            "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
        },
        {"destination": "/srv", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m", "ro"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
    ]
    value["linux"] |= {
        "sysctl": {"kernel.msgmax": "8192", "net.ipv4.ip_forward": "1"},
        "devices": [
            {"path": "/dev/kmsg2", "type": "c", "major": 1, "minor": 11, "fileMode": 0o600, "uid": 1, "gid": 2}
        ],
        "rootfsPropagation": "slave",
        "personality": {"domain": "LINUX32", "flags": ["UNAME26"]},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0-70", "flags": ["MPOL_F_STATIC_NODES"]},
        "uidMappings": [{"containerID": n, "hostID": 100000 + n, "size": 1} for n in range(300)],
        "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
        "timeOffsets": {"monotonic": {"secs": 10, "nanosecs": 5}, "boottime": {"secs": 7}},
    }
    value["linux"]["namespaces"] += [{"type": name} for name in ("user", "time", "cgroup")]
    return value


def hooked() -> dict[str, Any]:
    """Return one with hooks run by nsexec, and a terminal."""
    value = config("true", terminal=True, consoleSize={"height": 24, "width": 80})
    hook = {"path": "/bin/hook", "args": ["hook", "x"], "env": ["A=b"], "timeout": 3}
    value["hooks"] = {"createContainer": [hook, hook], "startContainer": [hook]}
    return value


def seeds() -> dict[str, bytes]:
    """Return inputs by name; valid ones start with "good"."""
    found = {f"bad {name}": INIT + data for name, data in BAD.items()}
    for name, value in (("plain", config("true")), ("rich", rich()), ("hooked", hooked())):
        spec = Spec.from_json(value)
        messages = plan.init_messages(
            spec,
            rootfs="/rootfs",
            bundle="/bundle",
            join={},
            cgroups={"": "/sys/fs/cgroup/x"},
            hook_state='{"a":1',
            filter=bytes(28),
            net_requests=[("eth0", pack("=IHHII", 24, 16, 5, 1, 0) + bytes(8))],
        )
        found[f"good {name}"] = INIT + messages
        process = Process.from_json(value["process"])
        found[f"good exec {name}"] = EXEC + plan.exec_messages(process, spec, {"ipc": "/proc/1/ns/ipc"}, bytes(12))
    found["good joined"] = INIT + plan.init_messages(
        Spec.from_json(config("true")), rootfs="/r", bundle="/", join={"uts": "/proc/1/ns/uts"}, cgroups={}
    )
    found["good rootless"] = (
        INIT
        + wire.bootstrap(
            create=wire.NAMESPACES["user"][0] | wire.NAMESPACES["mount"][0],
            uid_map=[IdMapping(0, 1000, 1)],
            gid_map=[IdMapping(0, 1000, 1)],
            map_programs=("/usr/bin/newuidmap", "/usr/bin/newgidmap"),
            setgroups=False,
        )
        + plan.init_messages(Spec.from_json(config("true")), rootfs="/r", bundle="/", join={}, cgroups={})[24:]
    )
    found["good pause"] = INIT + plan.pause_messages("/r", {"ipc": "/proc/1/ns/ipc"})
    return found


def front_seeds() -> dict[str, bytes]:
    """Return files that the front reads: front.state, exec.plan, passwd(5); the first byte selects which."""
    paths = {
        "freezer": "/sys/fs/cgroup/freezer/x",
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/x",
        "": "/sys/fs/cgroup/unified/x",
    }
    state = State("box", 7, 99, "2026-01-01T00:00:00.000000000Z", paths, bundle="/b", rootfs="/r")
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "state.json").touch()
        which = prepared.identity(f"{directory}/state.json")
        for name, value in (("plain", config("true")), ("rich", rich()), ("hooked", hooked())):
            runtime: Any = None
            container = Container(runtime, directory, state.but(labels={"of": name}), Spec.from_json(value))
            process = Process.from_json(value["process"] | {"terminal": False})
            found[f"good state {name}"] = b"S" + prepared.encode_state(container)
            found[f"good plan {name}"] = b"P" + prepared.encode_exec(container, process, which)
    found["good passwd"] = b"Hroot:x:0:0:root:/root:/bin/sh\nseven:x:7:7::/home/seven:\nshort:x:7\n"
    found["bad state"] = found["good state plain"][:-1] + b"x"
    return found


def write(directory: Path, inputs: dict[str, bytes]) -> int:
    """Write inputs to files; return the length of the longest."""
    for number, data in enumerate(inputs.values()):
        (directory / f"{number:03}").write_bytes(data)
    return max(map(len, inputs.values()))

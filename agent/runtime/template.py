"""`spec`: a config.json to start from."""

from __future__ import annotations

import os

from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.runtime.main import Call

CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
]  # fmt: skip
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def spec(call: Call) -> int:
    """Write config.json into the bundle.  Raises CommandError if there is one."""
    import json

    directory = call.options.text("bundle") or "."
    cgroup2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")  # noqa: PTH110
    document = config(rootless=call.options.flag("rootless"), cgroup2=cgroup2)
    path = os.path.join(directory, "config.json")  # noqa: PTH118
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise CommandError("File config.json exists. Remove it first") from None
    except OSError as error:
        what = f"open {path}" if os.path.isdir(directory) else f"chdir {directory}"  # noqa: PTH112
        raise CommandError(f"{what}: {(error.strerror or '').lower()}") from None
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        json.dump(document, file, indent="\t")
        file.write("\n")
    return 0


def config(*, rootless: bool, cgroup2: bool) -> dict[str, Any]:
    """Build the document: a shell with a terminal, in its own namespaces, with few privileges."""
    namespaces = ["pid", *([] if rootless else ["network"]), "ipc", "uts", "mount", *(["user"] if rootless else [])]
    namespaces += ["cgroup"] if cgroup2 else []
    linux: dict[str, Any] = {} if rootless else {"resources": {"devices": [{"allow": False, "access": "rwm"}]}}
    if rootless:
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    linux |= {
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": MASKED,
        "readonlyPaths": READONLY,
    }
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {kind: CAPABILITIES for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "runc",
        "mounts": list(_mounts(rootless)),
        "linux": linux,
    }


def _mounts(rootless: bool) -> list[dict[str, Any]]:
    kept = ["nosuid", "noexec", "nodev"]
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *([] if rootless else ["gid=5"])]
    sys = (
        ("/sys", "none", "/sys", ["rbind", "nosuid", "noexec", "nodev", "ro"])
        if rootless
        else ("/sys", "sysfs", "sysfs", [*kept, "ro"])
    )
    rows = [
        ("/proc", "proc", "proc", []),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", pts),
        ("/dev/shm", "tmpfs", "shm", [*kept, "mode=1777", "size=65536k"]),
        ("/dev/mqueue", "mqueue", "mqueue", kept),
        sys,
        ("/sys/fs/cgroup", "cgroup", "cgroup", [*kept, "relatime", "ro"]),
    ]
    return [
        {"destination": target, "type": kind, "source": source} | ({"options": options} if options else {})
        for target, kind, source, options in rows
    ]

"""`features`: what this runtime supports, in the specification's format (features.md)."""

from __future__ import annotations

import sys

from caisson.agent.base.json import dumps
from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.libcontainer.config.scheduling import MEMORY_FLAGS, MEMORY_MODES
from caisson.agent.libcontainer.config.seccomp import ACTIONS, ARCHITECTURES, COMPARISONS, FLAGS
from caisson.agent.libcontainer.config.spec import NAMESPACE_TYPES
from caisson.agent.libcontainer.plan.mounts import ATTRIBUTES, IDMAP, PROPAGATION, WITHOUT_EFFECT
from caisson.agent.libcontainer.state import OCI_VERSION
from caisson.agent.runtime.main import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.runtime.main import Call

HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
FILESYSTEM_FLAGS = ("sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand")


def features(call: Call) -> int:
    """Print the document."""
    sys.stdout.write(dumps(document(), 4) + "\n")
    return 0


def document() -> dict[str, object]:
    """Return the features document."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": list(HOOKS),
        "mountOptions": sorted(_mount_options()),
        "linux": {
            "namespaces": sorted(NAMESPACE_TYPES),
            "capabilities": list(CAPABILITIES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": True},
            "seccomp": _seccomp(),
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
            "memoryPolicy": {"modes": sorted(MEMORY_MODES), "flags": sorted(MEMORY_FLAGS)},
        },
        "annotations": {
            "org.opencontainers.runc.version": VERSION,
            "org.opencontainers.runc.checkpoint.enabled": "false",
        },
        "potentiallyUnsafeConfigAnnotations": ["org.systemd.property."],
    }


def _mount_options() -> set[str]:
    options = {*ATTRIBUTES, *(f"r{name}" for name in ATTRIBUTES), *PROPAGATION, *WITHOUT_EFFECT, *FILESYSTEM_FLAGS}
    return (options | {"bind", "rbind", "remount", "tmpcopyup", *IDMAP}) - {""}


def _seccomp() -> dict[str, object]:
    return {
        "enabled": True,
        "actions": sorted(ACTIONS),
        "operators": sorted(COMPARISONS),
        "archs": sorted(ARCHITECTURES),
        "knownFlags": sorted(FLAGS),
        "supportedFlags": sorted(FLAGS),
    }


def document_of_guest() -> dict[str, object]:
    """Return the features of containers in a VM: no host ids, no labels of its kernel, no hooks in the guest."""
    made = document()
    disabled = {"enabled": False}
    linux = {
        "namespaces": sorted({*NAMESPACE_TYPES} - {"user", "time"}),
        "capabilities": list(CAPABILITIES),
        "seccomp": _seccomp(),
        "apparmor": disabled, "selinux": disabled, "intelRdt": disabled, "mountExtensions": {"idmap": disabled},
    }  # fmt: skip
    hooks = ("prestart", "createRuntime", "poststart", "poststop")
    return {**made, "hooks": list(hooks), "mountOptions": sorted(_mount_options() - {*IDMAP}), "linux": linux}

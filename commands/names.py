"""Current names of objects, for shell completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def lookup(kind: str, values: Mapping[str, str]) -> Sequence[str]:
    """List the names of a kind; ``values`` are options given before.  Empty if they cannot be determined."""
    finders = {"vm": _vms, "container": _containers, "snapshot": _snapshots, "template": _templates}
    try:
        return finders[kind](values)
    except Exception:  # do not print errors into a line being edited
        return ()


def _vms(_: Mapping[str, str]) -> Sequence[str]:
    from caisson.image.vm import list_vms

    return [vm.name for vm in list_vms()]


def _containers(values: Mapping[str, str]) -> Sequence[str]:
    from caisson.agent.client.registry import container_registry
    from caisson.image.vm import get_vm

    return container_registry(get_vm(values.get("name", "default"))).names()


def _snapshots(_: Mapping[str, str]) -> Sequence[str]:
    from caisson.image.vm.snapshot.snapshot import snapshot_directory

    return sorted(path.name for path in snapshot_directory("any").parent.iterdir() if not path.name.startswith("."))


def _templates(_: Mapping[str, str]) -> Sequence[str]:
    from caisson.image.build.definition import TEMPLATES

    return sorted(path.parent.name for path in TEMPLATES.glob("*/image.yaml"))

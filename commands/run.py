"""Run container images, and manage stored ones."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from caisson.agent.client import foreground, run_specs
from caisson.agent.client.errors import UsageError
from caisson.agent.client.guest import guest_cpus, guest_memory
from caisson.agent.client.registry import container_registry
from caisson.commands.container import release_disk, remove_orphaned
from caisson.commands.execute import check_terminal
from caisson.commands.machines import find_or_boot_vm
from caisson.commands.streams import info, print_table, reporter
from caisson.image.build.cache import Cache, default_root
from caisson.image.containers import store
from caisson.image.containers.oci import find_image, pack_image
from caisson.image.programs import TO_PACK, require
from caisson.image.vm import RunningVM, VMError
from caisson.image.vm.hotplug import share as sharing
from caisson.image.vm.hotplug.disks import plug_disk

#: Valid container names in Kata and Docker.
CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}")

#: Valid host names in /etc/hosts and the kernel (sethostname(2)).
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

MIB = 1 << 20


def run(
    *, path: str, words: list[str], name: str, container: str, tty: bool, interactive: bool, detach: bool, rm: bool,
    env: list[str], env_file: list[str], user: str, workdir: str, hostname: str, entrypoint: str | None, memory: int,
    cpus: float, pids_limit: int | None, read_only: bool, tmpfs: list[str], volume: list[str], cap_add: list[str],
    cap_drop: list[str], privileged: bool, init: bool, timeout: float, tag: str, max_size: int, network: str,
    publish: list[str], verbose: bool,
) -> int:  # fmt: skip
    """Run an image as a container; returns its exit status, 0 if detached."""
    container = container or f"run-{uuid.uuid4().hex[:8]}"
    if not CONTAINER_NAME.fullmatch(container):
        raise UsageError(f"--container {container!r}: is not a name; letters, digits, . _ and -, at most 253 of them")
    if hostname and not HOST_NAME.fullmatch(hostname):
        raise UsageError(f"--hostname {hostname!r}: is not a host name; letters, digits, . _ and -, at most 64 of them")
    check_terminal(tty and not detach)
    if detach and rm:
        raise UsageError("--rm: cannot be combined with --detach; remove it later: caisson rm")
    shared = [_parse_volume(one) for one in volume]
    settings = [*(setting for file in env_file for setting in run_specs.env_file(file)), *env]
    require(TO_PACK, info)
    find_image(path, tag)  # before a VM is booted for it
    vm_name = name or ("default" if detach else "")
    with find_or_boot_vm(vm_name, reporter(verbose), network=network, publish=publish) as vm:
        registry = container_registry(vm)
        if container in registry.names():
            raise UsageError(f"container {container!r}: already exists; remove it: caisson rm {container}")
        remove_orphaned(vm)
        with contextlib.ExitStack() as stack:
            volumes = _share(vm, shared, stack)
            options = run_specs.RunOptions(
                env=settings, user=user, workdir=workdir, terminal=tty, hostname=hostname, entrypoint=entrypoint,
                memory=memory * MIB, cpus=cpus, pids_limit=pids_limit, read_only=read_only, tmpfs=tmpfs,
                volumes=volumes, cap_add=cap_add, cap_drop=cap_drop, privileged=privileged, init=init,
                architecture=vm.architecture, guest_memory=guest_memory(vm), guest_cpus=guest_cpus(vm),
                busybox=str(vm.manifest["containers"]["busybox"]) + "/bin/busybox",
            )  # fmt: skip
            size = max_size * MIB or None
            with pack_image(path, vm.architecture, tag=tag, max_size=size, report=info) as packed:
                document = run_specs.image_document(packed.config, packed.bundle, words, options, info)
                disk = packed.name or uuid.uuid4().hex[:24]
                stack.callback(release_disk, vm, container)
                stack.enter_context(registry.lease(container, disk=disk))
                slot = plug_disk(vm, packed.disk, disk)
            status = asyncio.run(
                foreground.run_image(
                    vm, container, document, slot, detach=detach, volumes=volumes, timeout=timeout, report=info
                )
            )
            if status is None:
                terminal = bool(document["process"]["terminal"])
                registry.add(container, disk=disk, root=document["root"]["path"], terminal=terminal)
                stack.pop_all()
                print(container)
    return status or 0


def _parse_volume(text: str) -> tuple[Path, str, bool]:
    """Parse HOST:GUEST[:ro|:rw]; with several colons, those that leave a directory are used.  Raises UsageError."""
    rest, mode = text, "rw"
    if text.endswith((":ro", ":rw")) and not Path(text).is_dir():
        rest, mode = text[:-3], text[-2:]
    host, _, guest = rest.rpartition(":")
    if not host or not guest.startswith("/"):
        raise UsageError(f"--volume {text}: is not HOST:GUEST[:ro]; the guest's path must be absolute")
    if not Path(host).is_dir():
        raise UsageError(f"--volume {text}: {host} is not a directory; name one to share")
    return Path(host), guest, mode == "rw"


def _share(
    vm: RunningVM, volumes: Sequence[tuple[Path, str, bool]], stack: contextlib.ExitStack
) -> list[run_specs.SharedVolume]:
    """Share directories with the guest; the stack unplugs the newly added ones.  Raises VMError."""
    found = []
    for host, guest, writable in volumes:
        shared = sharing.share(vm, host, writable=writable)
        if shared.new:
            stack.callback(_unshare, vm, shared.tag)
        found.append(run_specs.SharedVolume(shared.fstype, shared.tag, guest, writable))
    return found


def _unshare(vm: RunningVM, tag: str) -> None:
    with contextlib.suppress(VMError):  # another container has mounted it since, or the VM has exited
        sharing.unshare(vm, tag)


def images(*, as_json: bool) -> None:
    """List the stored container images."""
    rows: list[dict[str, Any]] = [
        {"name": name, "id": one.id[:12], "size": one.bytes, "used": int(one.used)}
        for one in store.images(Cache(default_root()))
        for name in one.names or ("-",)
    ]
    shown = (
        row | {"size": f"{row['size'] / 1e6:.1f} MB", "used": f"{datetime.fromtimestamp(row['used']):%Y-%m-%d %H:%M}"}
        for row in rows
    )
    print_table(("name", "id", "size", "used"), rows, shown, as_json=as_json)


def rmi(*, image: str) -> None:
    """Remove a stored image."""
    info(f"{store.remove(Cache(default_root()), image) / 1e6:.0f} MB freed")


def prune(*, older: float) -> None:
    """Remove stored images that have not been used for a while."""
    gone = store.prune(Cache(default_root()), older=older)
    info(f"{len(gone)} images removed, {sum(one.bytes for one in gone) / 1e6:.0f} MB freed")

"""VMs for pods: clones of a snapshot if it is large enough, otherwise booted from an image.

/etc/caisson/shim.toml configures them: ``snapshot`` and ``image`` (a directory), ``memory`` in MiB, ``cpus``,
``accel``, ``vsock``, ``block_roots``.  Nothing is built here: `caisson install-shim` has done that.
"""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caisson.agent.client import ReadinessProbe
from caisson.agent.pods.machines import SHARE_TAG, MachineError, NoPort, PodMachine
from caisson.image.vm import VM, VMConfig, VMError, find_vm
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import NoEmptyPort
from caisson.image.vm.hotplug.disks import plug_disk, unplug_disk
from caisson.image.vm.hotplug.interfaces import plug_interface
from caisson.image.vm.hotplug.share import end_server, share_of_namespace
from caisson.image.vm.launch import SupervisorProcess
from caisson.image.vm.snapshot.snapshot import Snapshot

#: Search path of services, and the directory in it for local programs.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
LOCAL = Path("/usr/local/bin")

#: containerd's name for the program of io.containerd.caisson.v2.
SHIM_PROGRAM = "containerd-shim-caisson-v2"

#: The snapshot that pods' VMs are cloned from.
POD_SNAPSHOT = "pods"

#: Configuration for containerd and docker, once the shim is in containerd's PATH.
INSTRUCTIONS = """
docker, in /etc/docker/daemon.json (or name the runtime itself: docker run --runtime io.containerd.caisson.v2):
    {"runtimes": {"caisson": {"runtimeType": "io.containerd.caisson.v2"}}}
Kubernetes, in /etc/containerd/config.toml of containerd 1.x (in 2.x, the plugin is io.containerd.cri.v1.runtime):
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.caisson]
      runtime_type = "io.containerd.caisson.v2"
      privileged_without_host_devices = true
"""

#: The configuration file; tests replace it.
CONFIGURATION = Path(os.environ.get("CAISSON_SHIM_CONFIG", "/etc/caisson/shim.toml"))

#: Its settings and their types.
SETTINGS = {
    "snapshot": str, "image": str, "memory": int, "cpus": int, "accel": str, "vsock": str, "block_roots": bool,
}  # fmt: skip

#: Descriptions of the types for error messages.
TYPES = {str: "a string", int: "a whole number; memory is in MiB", bool: "true or false"}

#: Ports that disks leave to network interfaces, which come later, and to shares.
SPARE_PORTS = 2


class Pods:
    """Machines for pods (caisson.agent.pods.machines.Machines); their VMs stop with this process, however it exits."""

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        configuration: Path = CONFIGURATION,
        text: str | None = None,
        supervisor: SupervisorProcess | None = None,
    ) -> None:
        """``settings`` or ``text`` replace the configuration file; ``supervisor`` is a prestarted one for the first VM.

        Errors in the configuration are raised by ``start``.
        """
        self._given = settings
        self._configuration = configuration
        self._text = text
        self._supervisor = supervisor

    @classmethod
    def from_config(cls, path: str, body: str, supervisor: SupervisorProcess | None = None) -> Pods:
        """Return machines configured by a runtime's options: by a file, or by its text."""
        if path:
            return cls(configuration=Path(path), supervisor=supervisor)
        return cls(configuration=Path("the runtime's options"), text=body, supervisor=supervisor)

    def _settings(self) -> Mapping[str, Any]:
        """Return the configuration.  Raises MachineError."""
        if self._given is not None:
            return self._given
        file = self._configuration
        try:
            settings = tomllib.loads(file.read_text() if self._text is None else self._text)
        except FileNotFoundError:
            raise MachineError(f"{file}: no such file; run: caisson install-shim") from None
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise MachineError(f"{file}: {error}") from error
        for name, value in settings.items():
            if name not in SETTINGS:
                raise MachineError(f"{file}: {name}: unknown setting; the settings are {', '.join(SETTINGS)}")
            if type(value) is not SETTINGS[name]:
                raise MachineError(f"{file}: {name}: not {TYPES[SETTINGS[name]]}")
        return settings

    @property
    def block_roots(self) -> bool:
        """Whether VMs get root file systems as disks.  Raises MachineError."""
        return bool(self._settings().get("block_roots"))

    def start(self, name: str, *, memory: int, cpus: int, share: tuple[str, Path] | None = None) -> PodMachine:
        """Start a VM.  Raises MachineError."""
        settings = self._settings()
        block_roots = bool(settings.get("block_roots"))
        devices: dict[str, Any] = {key: str(settings.get(key, "auto")) for key in ("accel", "vsock")}
        devices["writable_disks"] = block_roots
        devices["root_share"] = SHARE_TAG
        if share is not None:
            tag, directory = share
            devices["virtiofs"] = {tag: (str(directory), True)}
        supervisor, self._supervisor = self._supervisor, None
        try:
            config = self._config(settings, name, memory, cpus, devices)
            vm = VM.start(config, ready=ReadinessProbe(), supervisor=supervisor)
        except VMError as error:
            raise MachineError(str(error)) from error
        return SharedVM(vm, is_clone=config.snapshot is not None, block_roots=block_roots)

    @property
    def pids(self) -> Sequence[int]:
        return [self._supervisor.pid] if self._supervisor is not None else []

    def _config(
        self, settings: Mapping[str, Any], name: str, memory: int, cpus: int, devices: dict[str, Any]
    ) -> VMConfig:
        memory, cpus = max(memory, int(settings.get("memory", 0))), max(cpus, int(settings.get("cpus", 0)))
        if snapshot_name := settings.get("snapshot"):
            snapshot = Snapshot.named(str(snapshot_name))
            if memory <= snapshot.memory and cpus <= snapshot.cpus:
                return VMConfig.clone(snapshot, name=name, **devices)
        if not settings.get("image"):
            raise VMError(f"{self._configuration}: names no image; run: caisson install-shim")
        return VMConfig(image=Path(settings["image"]), name=name, memory=memory or 512, cpus=cpus or 1, **devices)

    def stop(self, name: str) -> None:
        """Stop a VM by name, if it is running.  Raises MachineError."""
        with _translated():
            if (vm := find_vm(name)) is not None:
                vm.stop()

    def agent_socket(self, name: str) -> Path:
        return VMDirectory.of(name).agent_socket


class SharedVM:
    """One VM, as the shim uses it."""

    def __init__(self, vm: VM, *, is_clone: bool, block_roots: bool) -> None:
        self._vm = vm
        self.is_clone = is_clone
        self.block_roots = block_roots

    @property
    def agent_socket(self) -> Path:
        return self._vm.agent_socket

    @property
    def pid(self) -> int:
        return int(self._vm.info["pids"]["supervisor"])

    def add_disk(self, file: Path, name: str, *, writable: bool, following: int) -> str:
        with _translated():
            return plug_disk(self._vm, file, name, writable=writable, spare=SPARE_PORTS + following)

    def remove_disk(self, name: str) -> bool:
        with _translated():
            return unplug_disk(self._vm, name)

    def end_share(self, tag: str) -> None:
        with _translated():
            end_server(self._vm, tag)

    def share_of_namespace(self, directory: str, tag: str, mount_namespace: int) -> None:
        with _translated():
            share_of_namespace(self._vm, directory, tag, mount_namespace)

    def add_interface(self, tap: int, mac: str) -> None:
        with _translated():
            plug_interface(self._vm, tap, mac)

    def stop(self) -> None:
        with _translated():
            self._vm.stop()


@contextlib.contextmanager
def _translated() -> Any:
    try:
        yield
    except NoEmptyPort as error:
        raise NoPort(str(error)) from error
    except VMError as error:
        raise MachineError(str(error)) from error


def install_shim(*, image: str, memory: int, cpus: int, config: str, accel: str, vsock: str) -> None:
    """Build an image and a snapshot, write the shim's configuration, link its program for containerd, and print what to
    configure elsewhere.
    """
    import sysconfig

    from caisson.commands.machines import image_directory
    from caisson.commands.snapshot import save_snapshot
    from caisson.commands.streams import check_writable, info
    from caisson.image.programs import TO_SERVE_PODS

    file = Path(config)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VMError(f"{file}: {(error.strerror or '').lower()}; choose another place: --config FILE") from error
    check_writable("--config", file)  # fail now, not after minutes of building
    directory = image_directory(image, info, also=TO_SERVE_PODS)
    if vsock == "auto":
        vsock = "user"  # with the kernel's device a clone maps its snapshot's memory, and cannot get a share
    save_snapshot(
        name=POD_SNAPSHOT, image=str(directory), memory=memory, cpus=cpus, append="", accel=accel, vsock=vsock
    )
    settings = {"snapshot": POD_SNAPSHOT, "image": str(directory), "accel": accel, "vsock": vsock}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    lines += [f"memory = {memory}", f"cpus = {cpus}"]
    file.write_text("\n".join(lines) + "\n")
    info(f"{file}: written")
    info(link_program(Path(sysconfig.get_path("scripts")), LOCAL, PATH))
    print(INSTRUCTIONS.strip())


def link_program(scripts: Path, directory: Path, path: str) -> str:
    """Link this installation's shim into a directory of ``path``, containerd's search path, unless it is found there;
    returns a line on where it is, or why not.
    """
    import shutil

    program, link = scripts / SHIM_PROGRAM, directory / SHIM_PROGRAM
    if not program.exists():
        return f"{SHIM_PROGRAM}: not installed; run: python3 -m venv /opt/caisson && /opt/caisson/bin/pip install ."
    found = shutil.which(SHIM_PROGRAM, path=path)
    if found is not None and Path(found).samefile(program):
        return f"{found}: containerd finds it here"
    try:
        if link.is_symlink():
            link.unlink()  # from an earlier installation
        link.symlink_to(program)
    except OSError as error:
        why = (error.strerror or "").lower()
        return f"{link}: {why}; containerd looks in {path}; link it there: ln -sf {program} {link}"
    return f"{link}: linked to {program}"

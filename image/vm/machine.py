"""Virtual machines, as seen by their starter and users."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from caisson.image.vm import exit_reason, qemu
from caisson.image.vm.accel import Choice, is_open
from caisson.image.vm.children import TITLES
from caisson.image.vm.config import VMConfig, shares_to_plug
from caisson.image.vm.directory import VMDirectory, find_running, running_vms
from caisson.image.vm.errors import VMError
from caisson.image.vm.exit_reason import POWERED_OFF
from caisson.image.vm.launch import SupervisorProcess
from caisson.image.vm.logs import Follower
from caisson.image.vm.pace import scaled
from caisson.image.vm.runroot import owned_run_root
from caisson.image.vm.snapshot.snapshot import Snapshot, SnapshotCompatibility, snapshot_directory
from caisson.image.vm.supervisor_connection import STOP_TIMEOUT, SupervisorConnection
from caisson.proto.contract import VM_FORMAT

#: Timeouts in seconds for the agent to answer: native, and emulated on a busy machine.
AGENT_TIMEOUT = {"kvm": 60.0, "tcg": 240.0}

#: Seconds for the firmware to print something under KVM, once QEMU is up: normally milliseconds.
KVM_SILENCE_TIMEOUT = 8.0

#: Seconds between two probes of the agent, if probing itself takes no time.
READY_INTERVAL = 0.02

#: Polling interval of the firmware's log in seconds.
FIRMWARE_INTERVAL = 0.002


class GuestDoesNotRun(VMError):
    """KVM accepts the guest but does not run it: the back end of /dev/kvm does not support stock guests."""


class VM:
    """A running VM.  As a context manager it is stopped at the end, unless detached."""

    def __init__(self, directory: VMDirectory, info: dict[str, Any] | None = None) -> None:
        self._directory = directory
        self._info = info or {}
        self._config: VMConfig | None = None  # if it was started here
        self._connection: SupervisorConnection | None = None  # if it was started here
        self._shown = 0  # bytes of the console already passed on
        self._firmware_spoke = False

    @property
    def name(self) -> str:
        return self._directory.name

    @property
    def directory(self) -> Path:
        return self._directory.path

    @property
    def agent_socket(self) -> Path:
        """Return the Unix socket of the agent, for any gRPC client."""
        return self._directory.agent_socket

    @property
    def vsock_socket(self) -> Path:
        """Return the Unix socket on which CONNECT <port> reaches a port of the guest."""
        return self._directory.vsock_socket

    def host_port(self, port: int) -> Path:
        """Return the Unix socket to listen on for the guest's connections to a vsock port of the host."""
        return self.vsock_socket.with_name(f"{self.vsock_socket.name}_{port}")

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest of the guest's image.  Raises VMError if the VM has exited."""
        try:
            return dict(json.loads((self.directory / "image.json").read_text()))
        except FileNotFoundError:
            raise VMError(f"VM {self.name!r}: has ended; start it: caisson boot-vm {self.name} --detach") from None

    @property
    def architecture(self) -> str:
        """Return the guest's architecture as Debian has it: amd64.  Raises VMError if the VM has exited."""
        return str(self.manifest["arch"])

    @property
    def kernel_words(self) -> list[str]:
        """Return the words of the kernel's command line."""
        command = list(self.info.get("command", ()))
        return str(command[command.index("-append") + 1]).split() if "-append" in command else []

    @property
    def info(self) -> dict[str, Any]:
        """Return the current vm.json, or the last one read.

        It has name, state (starting or running), directory, image, accel and vsock with their reasons, cid, memory
        (MiB), cpus, shares, network, started (seconds since the epoch), spawned (when QEMU was, in seconds of this
        machine's CLOCK_MONOTONIC), boot_seconds once it is running, command and pids.
        """
        self._info = self._directory.read() or self._info
        return self._info

    @classmethod
    def start(
        cls,
        config: VMConfig,
        *,
        ready: Callable[[Path], bool],
        report: Callable[[str], None] = lambda line: None,
        console: Callable[[bytes], None] | None = None,
        firmware: Callable[[bytes], None] | None = None,
        timeout: float | None = None,
        supervisor: SupervisorProcess | None = None,
    ) -> VM:
        """Boot a VM and wait until ``ready(agent_socket)`` is true; that is called repeatedly, and may block briefly.

        ``report`` gets a line on what was chosen and why, ``console`` what the guest prints meanwhile, ``firmware``
        immediately what its firmware prints, if configured; ``supervisor`` is a waiting one, which exits if this
        fails.  Raises VMError if the VM exits, or is not ready within ``timeout`` seconds; nothing is left then.
        """
        began = time.monotonic()
        owned_run_root(make=True)
        directory = VMDirectory.of(config.name)
        exit_reason.clear(directory)
        config = dataclasses.replace(config, image=Path(config.image).resolve())
        accelerator, transport = config.choices()
        report(f"{accelerator.reason}; {transport.reason}")
        if config.snapshot:
            config.snapshot.check(SnapshotCompatibility.current(config.image, accelerator.name, transport.name))

        later = {**shares_to_plug(config), **config.virtiofs}
        shares = {tag: each for tag, each in config.shares.items() if tag not in later}
        config = dataclasses.replace(config, shares=shares, virtiofs={})
        if config.snapshot and transport.name == "user":
            config, later = dataclasses.replace(config, virtiofs=later), {}  # present when the guest resumes

        def boot(accelerator: Choice, supervisor: SupervisorProcess | None = None) -> VM:
            limit = timeout or scaled(AGENT_TIMEOUT[accelerator.name])
            started = supervisor or SupervisorProcess()
            vm = cls._boot(config, accelerator, transport, ready, console, firmware, (began, limit), started)
            vm._plug(later)
            return vm

        try:
            return boot(accelerator, supervisor)
        except GuestDoesNotRun as error:
            if config.snapshot or not is_open(config.accel):
                raise
            report(f"{str(error).partition(chr(10))[0]}; going on with TCG (emulation)")
            return boot(Choice("tcg", f"TCG (emulation), not KVM: {error}"))

    @classmethod
    def _boot(
        cls,
        config: VMConfig,
        accelerator: Choice,
        transport: Choice,
        ready: Callable[[Path], bool],
        console: Callable[[bytes], None] | None,
        firmware: Callable[[bytes], None] | None,
        time_limit: tuple[float, float],
        supervisor: SupervisorProcess,
    ) -> VM:
        """Start a VM and wait for its agent; the limit is a monotonic time, and seconds from then.  Raises VMError."""
        directory = VMDirectory.of(config.name)
        vm = cls(directory)
        # Under KVM the firmware's first output shows that the guest runs at all.
        watched = accelerator.name == "kvm" and not config.snapshot and not config.savable
        vm._config = dataclasses.replace(config, firmware=config.firmware or watched)
        try:
            vm._launch(supervisor, vm._config, accelerator, transport)
            follower = Follower(directory.console, console)
            with follower, Follower(directory.firmware, firmware, interval=FIRMWARE_INTERVAL):
                vm._await(ready, *time_limit, accelerator)
            vm._shown = follower.position
        except VMError as error:
            why = f"VM {config.name!r}: {str(error).partition(chr(10))[0].removeprefix(f'VM {config.name!r}: ')}"
            if accelerator.doubt:
                why += f"; {accelerator.doubt}: choose --accel tcg"
            # Some back ends lack what QEMU sets up, and it gives up before the guest's first instruction.
            never_ran = accelerator.name == "kvm" and not vm._firmware_spoke and str(error).startswith(TITLES["qemu"])
            kind = GuestDoesNotRun if isinstance(error, GuestDoesNotRun) or never_ran else VMError
            raise kind("\n".join(filter(None, (why, vm._abandon())))) from error
        except BaseException:
            vm._abandon()
            raise
        return vm

    def _plug(self, shares: Mapping[str, tuple[str, bool]]) -> None:
        """Plug in the shares of a VM just booted.  Raises VMError, after which it has exited."""
        from caisson.image.vm.hotplug.share import share  # late: that imports this module

        try:
            for tag, (path, writable) in shares.items():
                share(self, Path(path), tag, writable=writable)
        except BaseException:
            self._abandon()
            raise

    def _launch(self, supervisor: SupervisorProcess, config: VMConfig, accelerator: Choice, transport: Choice) -> None:
        """Make a supervisor start the VM."""
        self._connection = SupervisorConnection(supervisor)
        document = config.document(accelerator, transport)
        program = qemu.probe(qemu.architecture_of(qemu.read_manifest(config.image)[1]))
        with contextlib.suppress(OSError):  # the outcome is received below
            self._connection.send(
                document | {"directory": str(self.directory), "program": dataclasses.astuple(program)}
            )
        self._info = self._connection.receive()["info"]

    def _await(self, ready: Callable[[Path], bool], began: float, limit: float, accelerator: Choice) -> None:
        """Wait for the agent.  Raises VMError; GuestDoesNotRun if KVM does not run the firmware."""
        assert self._connection is not None
        created: float | None = None  # when QEMU created the firmware's log, empty
        while not ready(self.agent_socket):
            with contextlib.suppress(TimeoutError):
                self._connection.receive(READY_INTERVAL)
            now = time.monotonic()
            if accelerator.name == "kvm" and self._firmware_is_silent():
                created = created or now
                if now - created > (silence_limit := scaled(KVM_SILENCE_TIMEOUT)):
                    raise GuestDoesNotRun(
                        f"KVM does not run the guest: its firmware has printed nothing in {silence_limit:.0f} s"
                    )
            if now - began > limit:
                silence = self._directory.console_silence()
                raise VMError(f"agent: did not answer within {limit:.0f} s; {silence} ({accelerator.reason})")
        with contextlib.suppress(OSError):
            self._connection.send({"ready": round(time.monotonic() - began, 3)})
        self._info = self._connection.receive()["info"]

    def _firmware_is_silent(self) -> bool:
        """Return whether the firmware has a log (only on x86) but has not printed anything."""
        try:
            empty = self._directory.firmware.stat().st_size == 0
        except OSError:
            return False
        self._firmware_spoke = self._firmware_spoke or not empty
        return empty

    def _abandon(self) -> str:
        """Shut down what was started here; returns the last output of QEMU and the guest."""
        return "" if self._connection is None else self._connection.stop_vm()

    @property
    def _is_attached(self) -> bool:
        """Whether it was started here and not detached."""
        return self._connection is not None and self._connection.is_open

    def wait(self, console: Callable[[bytes], None] | None = None) -> None:
        """Wait until a VM started here exits.  Raises VMError unless the guest powered off itself."""
        assert self._connection is not None, "only its starter waits for a VM"
        with Follower(self._directory.console, console, self._shown):
            try:
                while True:
                    self._connection.receive()
            except VMError as end:
                if not str(end).startswith(POWERED_OFF):
                    raise VMError(f"VM {self.name!r}: {end}") from None

    def show(self, console: Callable[[bytes], None], *, follow: bool) -> None:
        """Pass on the guest's output so far, and with ``follow`` until the VM exits."""
        with Follower(self._directory.console, console), self.exit_fd() as supervisor:
            if follow and supervisor is not None:
                select.select([supervisor], [], [])

    def detach(self) -> None:
        """Leave the VM running without its starter.  Raises VMError if it has exited meanwhile."""
        assert self._connection is not None and self._connection.is_open, "only its starter can detach a VM"
        try:
            self._connection.send({"detach": True})
        except OSError:
            raise VMError(f"VM {self.name!r}: it has ended{self._abandon()}") from None
        self._connection.close()

    def save(self, name: str) -> int:
        """Save a savable guest as a snapshot, replacing an older one, and stop it; returns the bytes on disk.

        Raises VMError.
        """
        config, connection = self._config, self._connection
        assert connection is not None and config is not None and config.savable, (
            "only the starter of a savable VM can save it"
        )
        compatibility = SnapshotCompatibility.current(config.image, self._info["accel"], self._info["vsock"])
        snapshot = Snapshot(
            name, snapshot_directory(name), config.image, compatibility, config.memory, config.cpus, config.append
        )
        document = dataclasses.asdict(snapshot) | {"directory": str(snapshot.directory), "image": str(snapshot.image)}
        try:
            connection.send({"save": document})
            size = int(connection.receive()["saved"])
        except (OSError, VMError) as error:
            raise VMError(f"snapshot {name!r}: {connection.exit_reason or error}") from error
        finally:
            self._abandon()
        return size

    def exit_reason(self, timeout: float = 2.0) -> str | None:
        """Return why the VM has exited; None if it is still running after ``timeout`` seconds.

        For callers that have lost its agent: a VM takes a moment to exit.
        """
        if self._connection is not None and self._connection.is_open:
            self._connection.wait_for_exit(timeout)
            reason = self._connection.exit_reason
            return reason and reason.partition("\n")[0]
        with self.exit_fd() as supervisor:
            if supervisor is not None and not select.select([supervisor], [], [], timeout)[0]:
                return None
        return exit_reason.read(self._directory).partition("\n")[0] or "its supervisor died"

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop it; returns when nothing of it is left.  Raises VMError on timeout (``timeout`` seconds).

        A VM that has already exited is not an error.
        """
        if self._is_attached:
            self._abandon()
            return
        with self.exit_fd() as supervisor:
            if supervisor is None:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(supervisor, signal.SIGTERM)
            ended, _, _ = select.select([supervisor], [], [], timeout)
        if not ended:
            pid = self._info["pids"]["supervisor"]
            raise VMError(f"VM {self.name!r}: did not stop within {timeout:.0f} s; kill its supervisor: kill -9 {pid}")
        if self._connection is not None:
            self._connection.reap()

    @contextlib.contextmanager
    def exit_fd(self) -> Iterator[int | None]:
        """Yield a descriptor that becomes readable when the VM exits; None if it already has."""
        pid = self.info.get("pids", {}).get("supervisor")
        try:
            pidfd = None if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            pidfd = None
        try:
            # The lock is held, so the pid is the supervisor's, and not reused.
            held = self._directory.is_running() and self._directory.read().get("pids", {}).get("supervisor") == pid
            yield pidfd if held else None
        finally:
            if pidfd is not None:
                os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_attached:
            self._abandon()


def find_vm(name: str) -> VM | None:
    """Return the running VM of this name; None if there is none.

    Raises VMError for an invalid name, and for a VM of an incompatible version of Caisson.
    """
    found = find_running(name)
    return VM(*found) if found else None


def get_vm(name: str) -> VM:
    """Return the running VM of this name.  Raises VMError listing the running ones."""
    vm = find_vm(name)
    if vm is None:
        names = ", ".join(other.name for other in list_vms()) or "none"
        why = exit_reason.describe(VMDirectory.of(name))
        raise VMError(
            f"VM {name!r}: is not running; running: {names}; start it: caisson boot-vm {name} --detach"
            + (f"\n{why}" if why else "")
        )
    return vm


def list_vms() -> list[VM]:
    """Return this user's running VMs, by name; those of incompatible versions are left out."""
    vms = ((directory, directory.read()) for directory in running_vms())
    return [VM(directory, info) for directory, info in vms if info and info.get("format") == VM_FORMAT]


def vms_of_other_versions() -> dict[str, str]:
    """Return this user's running VMs of incompatible versions: each one's version by name."""
    infos = ((directory.name, directory.read()) for directory in running_vms())
    return {name: str(info.get("version", "0.1")) for name, info in infos if info and info.get("format") != VM_FORMAT}

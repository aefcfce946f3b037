"""Virtual machines, as seen by their starters: booted, watched while they boot, saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from caisson.image.vm import exit_reason, qemu
from caisson.image.vm.accel import Choice, is_open
from caisson.image.vm.config import VMConfig, shares_to_plug
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMError
from caisson.image.vm.exit_reason import POWERED_OFF, TITLES
from caisson.image.vm.launch import SupervisorProcess
from caisson.image.vm.logs import Follower
from caisson.image.vm.pace import scaled
from caisson.image.vm.running import STOP_TIMEOUT, RunningVM
from caisson.image.vm.runroot import owned_run_root
from caisson.image.vm.snapshot.snapshot import Snapshot, SnapshotCompatibility, snapshot_directory
from caisson.image.vm.supervisor_connection import SupervisorConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

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


class VM(RunningVM):
    """A VM and its starter.  As a context manager it is stopped at the end, unless detached."""

    def __init__(self, directory: VMDirectory) -> None:
        super().__init__(directory, {})
        self._config: VMConfig | None = None
        self._connection: SupervisorConnection | None = None
        self._shown = 0  # bytes of the console already passed on
        self._firmware_spoke = False

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
        config = config.but(image=Path(config.image).resolve())
        accelerator, transport = config.choices()
        report(f"{accelerator.reason}; {transport.reason}")
        if config.snapshot:
            saved_by = config.snapshot.compatibility.qemu  # its supervisor will compare it with QEMU's
            config.snapshot.check(
                SnapshotCompatibility.current(config.image, accelerator.name, transport.name, saved_by)
            )

        later = {**shares_to_plug(config), **config.virtiofs}
        shares = {tag: each for tag, each in config.shares.items() if tag not in later}
        config = config.but(shares=shares, virtiofs={})
        if config.snapshot and transport.name == "user":
            config, later = config.but(virtiofs=later), {}  # present when the guest resumes

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
        vm._config = config.but(firmware=config.firmware or watched)
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
        architecture = qemu.architecture_of(qemu.read_manifest(config.image)[1])
        if config.snapshot:
            program = qemu.expected(architecture, config.snapshot.compatibility.qemu)
        else:
            program = qemu.probe(architecture)
        with contextlib.suppress(OSError):  # the outcome is received below
            self._connection.send(document | {"directory": str(self.directory), "program": vars(program)})
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
        program = qemu.probe(qemu.architecture_of(qemu.read_manifest(config.image)[1]))
        here = (self._info["accel"], self._info["vsock"], program.title)
        compatibility = SnapshotCompatibility.current(config.image, *here)
        snapshot = Snapshot(
            name, snapshot_directory(name), config.image, compatibility, config.memory, config.cpus, config.append
        )
        try:
            connection.send({"save": snapshot.document()})
            size = int(connection.receive()["saved"])
        except (OSError, VMError) as error:
            raise VMError(f"snapshot {name!r}: {connection.exit_reason or error}") from error
        finally:
            self._abandon()
        return size

    def exit_reason(self, timeout: float = 2.0) -> str | None:
        if self._connection is not None and self._connection.is_open:
            self._connection.wait_for_exit(timeout)
            reason = self._connection.exit_reason
            return reason and reason.partition("\n")[0]
        return super().exit_reason(timeout)

    def stop(self, timeout: float = STOP_TIMEOUT) -> bool:
        if self._is_attached:
            self._abandon()
            return True
        stopped = super().stop(timeout)
        if stopped and self._connection is not None:
            self._connection.reap()
        return stopped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_attached:
            self._abandon()

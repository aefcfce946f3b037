"""The process that owns a VM: it starts QEMU and the vsock back end, and shuts everything down.

    python -m caisson.image.vm.supervisor FD     FD: a socket to whoever starts the VM

The messages on the socket, a JSON object a line:
    starter → supervisor    the configuration; {"ready": seconds} when the agent answers; {"detach": true};
                            {"save": …snapshot.json…} of one that can become a snapshot
    supervisor → starter    {"info": …vm.json…} when the VM is started, and again when it is ready; {"ended": "why"};
                            {"saved": bytes}

and on control.sock, one request a connection, from whoever may enter the VM's directory:
    {"share": tag, "path": directory, "writable": bool}     a virtiofsd for it: {"socket": path}, or {"error": "why"};
                                                            with the descriptor of a mount namespace, it runs in that
    {"unshare": tag}                                        and the end of it: {}

The end comes when QEMU, the back end, or the virtiofsd of containers' root file systems ends, on SIGTERM, or when the
starter goes away undetached (end of file on the socket).  A killed supervisor cannot clean up, so its children have the
kernel's parent-death signal, and a janitor does the rest.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from caisson.image.vm import exit_reason, network, qemu
from caisson.image.vm.accel import Choice
from caisson.image.vm.children import ChildProcesses
from caisson.image.vm.directory import VMDirectory, janitor
from caisson.image.vm.errors import VMError
from caisson.image.vm.exit_reason import POWERED_OFF, STOPPED
from caisson.image.vm.hotplug import virtiofs
from caisson.image.vm.hotplug.virtiofsd import Shares
from caisson.image.vm.jsonsocket import JSONSocket
from caisson.image.vm.logs import TRIM_INTERVAL, LogRing
from caisson.image.vm.network import FIRST_UNPRIVILEGED, Publish
from caisson.image.vm.sandbox import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_FOWNER,
    CAP_NET_BIND_SERVICE,
    SUPERVISOR,
    Confinement,
    confine_parent,
)
from caisson.image.vm.snapshot import migration, ram
from caisson.image.vm.vsock import backend as vsock
from caisson.proto.contract import VERSION, VM_FORMAT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

#: Seconds between two checks for a suspended host, and the minimum that counts: clocks are inexact.
SUSPEND_CHECK_INTERVAL = 10.0
MIN_SUSPENDED = 1.0

#: File size limit in bytes of QEMU and the vsock device: for a log, of which the end is kept.
QEMU_FILE_SIZE = 64 << 30
VSOCK_FILE_SIZE = 1 << 30

#: Seconds for a request on control.sock to arrive.
REQUEST_TIMEOUT = 0.6

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ended(Exception):
    """The VM must stop, or has exited; the text says why."""


def seconds_suspended() -> float:
    """Return the seconds that this machine has been suspended since boot (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class Supervisor:
    """Keep one VM, from the creation of its directory to its removal."""

    def __init__(
        self,
        config: dict[str, Any],
        starter: JSONSocket,
        stop: socket.socket,
        suspended: Callable[[], float] = seconds_suspended,
    ) -> None:
        self._config = config
        self._suspended = suspended
        self._noticed = suspended()  # the part already handled
        self._directory = VMDirectory(Path(config["directory"]))
        self._starter = starter
        self._stop = stop
        self._info: dict[str, Any] = {}
        self._ram: IO[bytes] | None = None  # the guest's memory, if it is our file

    def run(self) -> str:
        """Run the VM until it exits, and return the reason.  Nothing is left then."""
        why = ""
        try:
            with janitor(self._directory), self._directory.create():
                try:
                    self._keep()
                except (Ended, VMError) as end:
                    why = str(end)
                    # To QEMU, the reboot after a panic is an exit like any other.
                    panic = re.search(r"Kernel panic - not syncing: (.*)", self._directory.console_tail(200))
                    if why == POWERED_OFF and panic:
                        why = f"the guest's kernel panicked: {panic[1]}"
                finally:
                    why += self._diagnostics()
                    exit_reason.record(self._directory, why)
                    self._directory.remove()
        except VMError as error:
            why = str(error)
        except Exception:  # its stderr is /dev/null
            import traceback

            why = f"its supervisor failed: {traceback.format_exc()}"
        return why

    def _diagnostics(self) -> str:
        """Return the last output of QEMU and the guest: the directory will be gone."""
        texts = {
            "QEMU says": self._directory.qemu_tail(),
            "the console's last lines": self._directory.console_tail(),
        }
        return "".join(f"\n{title}:\n{text}" for title, text in texts.items() if text)

    def _keep(self) -> None:
        """Start everything and wait until it exits, which raises Ended."""
        config, directory = self._config, self._directory
        image = Path(config["image"])
        accelerator, transport = Choice(**config["accel"]), Choice(**config["vsock"])
        text, manifest = qemu.read_manifest(image)
        # A description of the running image, even if it is removed from the builder's cache.
        (directory.path / "image.json").write_text(text)
        version = tuple(config["program"]["version"])  # JSON has no tuples
        program = qemu.QemuProgram(**config["program"] | {"version": version})
        with directory.qemu_log.open("wb") as log, ChildProcesses(log) as children, contextlib.ExitStack() as stack:
            saved = ram.SavedFiles(Path(config["snapshot"])) if config["snapshot"] else None
            if saved:
                stack.callback(saved.close)
            memory = self._open_memory(saved, transport.name, stack)
            device = self._prepare_device(saved is not None, transport.name, stack)
            devices = qemu.Devices(
                console=directory.console,
                qmp=directory.qmp_socket,
                vsock=transport.name,
                vsock_fd=device.fd if device else -1,
                cid=device.cid if device else 0,
                ram=Path(f"/proc/self/fd/{memory.fileno()}") if memory else None,
                clone=saved is not None,
                firmware=directory.firmware if config["firmware"] else None,
            )
            wanted = qemu.MachineSpec.of(directory.name, accelerator.name, config)
            command = qemu.command(program, image, manifest, devices, wanted)
            # In parallel: QEMU waits for the device by itself, on their socket.
            if device:
                vsock_confinement = Confinement(file_size=VSOCK_FILE_SIZE, writable=[directory.path])
                children.spawn("vsock", device.command, device.backend_fds, vsock_confinement)
            fds = ([device.fd] if device else []) + ([memory.fileno()] if memory else [])
            spawned = time.monotonic()
            children.spawn("qemu", command, fds, qemu_confinement(config, directory, image, manifest))
            shares = Shares(directory, children, config["root_share"])
            plug = qemu.vsock_plug(transport.name) if saved else []
            for number, (tag, (path, writable)) in enumerate(config["virtiofs"].items()):
                socket_path = shares.serve(tag, Path(path), writable)
                plug += virtiofs.plug(tag, str(socket_path), f"port{number}")
            if saved and self._ram:  # while these start: it is not read before the state is restored
                ram.fill(self._ram, saved)
            if device:
                device.close_inherited()
                device.wait()
            control = stack.enter_context(socket.socket(socket.AF_UNIX))
            control.bind(str(directory.control_socket))
            control.listen()
            self._info = self._describe(accelerator, transport, device.cid if device else None) | {
                "spawned": spawned,
                "command": list(command),
                "pids": {"supervisor": os.getpid()} | children.pids,
                "virtiofs": shares.served,
            }
            self._publish()
            if saved:
                running = partial(children.is_running, "qemu")
                migration.restore(directory.qmp_socket, self._scratch, saved, program.title, running, plug)
                saved.close()
                if self._ram:
                    self._ram.close()  # QEMU and the device have it
                    self._ram = None
            self._watch(children, control, shares)

    def _open_memory(
        self, saved: ram.SavedFiles | None, transport: str, stack: contextlib.ExitStack
    ) -> IO[bytes] | None:
        """Open the file that is the guest's memory; None where QEMU allocates it."""
        if saved and transport == "vhost":
            # QEMU maps it privately.  By a descriptor: its own mounts are read-only.
            return saved.memory
        if saved or self._config["savable"]:
            self._ram = stack.enter_context(ram.memory_file(self._config["memory"]))
        return self._ram

    def _prepare_device(self, clone: bool, transport: str, stack: contextlib.ExitStack) -> vsock.Backend | None:
        """Prepare the vsock device; None for a guest to be saved, whose clones get one each."""
        if transport != "vhost" and self._config["savable"]:
            return None
        # A clone's CID must differ from its siblings', even if nothing else requires it.
        cid = vsock.random_cid() if clone else vsock.USER_CID
        return stack.enter_context(vsock.prepare(transport, self._directory, cid))

    def _describe(self, accelerator: Choice, transport: Choice, cid: int | None) -> dict[str, Any]:
        """Return what vm.json says of the VM before its processes are known."""
        config, directory = self._config, self._directory
        return {
            "format": VM_FORMAT,
            "version": VERSION,
            "name": directory.name,
            "state": "starting",
            "directory": str(directory.path),
            "image": str(Path(config["image"])),
            "snapshot": Path(config["snapshot"]).name if config["snapshot"] else None,
            "accel": accelerator.name,
            "accel_reason": accelerator.reason,
            "vsock": transport.name,
            "vsock_reason": transport.reason,
            "cid": cid,
            "memory": config["memory"],
            "cpus": config["cpus"],
            "max_memory": config["max_memory"],
            "max_cpus": config["max_cpus"],
            "shares": config["shares"],
            "network": network.document(config["network"], [Publish(**rule) for rule in config["publish"]]),
            "started": time.time(),
        }

    @property
    def _scratch(self) -> Path:
        return self._directory.path / "state.sock"

    def _save(self, document: dict[str, Any], alive: Callable[[], bool]) -> None:
        """Stop the guest and store it as a snapshot."""
        from caisson.image.vm.snapshot.snapshot import Snapshot, SnapshotCompatibility, store  # hashes: 4 MiB

        assert self._ram is not None, "only a guest that was started as savable can be saved"
        document |= {"directory": Path(document["directory"]), "image": Path(document["image"])}
        snapshot = Snapshot(**document | {"compatibility": SnapshotCompatibility(**document["compatibility"])})
        state = migration.save(self._directory.qmp_socket, self._scratch, alive)
        send(self._starter, {"saved": store(snapshot, self._ram.fileno(), state)})

    def _publish(self) -> None:
        self._directory.write(self._info)
        send(self._starter, {"info": self._info})

    def _watch(self, children: ChildProcesses, control: socket.socket, shares: Shares) -> None:
        """Wait until something ends the VM; raises Ended."""
        watched: list[Any] = [self._starter, self._stop, control]
        interval = min(SUSPEND_CHECK_INTERVAL, TRIM_INTERVAL)
        directory = self._directory
        logs = LogRing([directory.console, directory.firmware, directory.qemu_log])
        while True:
            ready, _, _ = select.select([*watched, *children.pidfds], [], [], interval)
            logs.trim()
            self._check_suspend(children)
            if self._stop in ready:
                raise Ended(STOPPED)
            if reason := children.exit_reason(ready):
                raise Ended(reason)
            if self._starter in ready and not self._handle_starter(children):
                watched.remove(self._starter)
            if control in ready:
                self._answer(control, shares)

    def _check_suspend(self, children: ChildProcesses) -> None:
        """Run the configured command if the host was suspended."""
        words, suspended = self._config["on_resume"], self._suspended()
        if words and suspended - self._noticed > MIN_SUSPENDED:
            self._noticed = suspended
            children.end("on resume")
            children.spawn("on resume", [*words, str(self._directory.agent_socket)], [], Confinement(), helper=True)

    def _answer(self, control: socket.socket, shares: Shares) -> None:
        """Answer one request on control.sock; one that does not arrive in time gets no response."""
        connection, _ = control.accept()
        with connection, contextlib.suppress(OSError, ValueError):
            lines = JSONSocket(connection, max_fds=1)
            try:
                question = lines.receive(REQUEST_TIMEOUT) or {}
                answer = shares.answer(question, lines.fds)
            except VMError as error:
                answer = {"error": str(error)}
            finally:
                for fd in lines.fds:
                    os.close(fd)
            self._publish()
            lines.send(answer)

    def _handle_starter(self, children: ChildProcesses) -> bool:
        """Handle the starter's messages; False after the last one.  Raises Ended if the starter is gone."""
        while True:
            try:
                message = self._starter.receive(0)
            except TimeoutError:
                return True
            if message is None:
                raise Ended("the command that started it has exited")
            if "detach" in message:
                return False
            if "save" in message:
                self._save(message["save"], partial(children.is_running, "qemu"))
            if "ready" in message:
                self._info |= {"state": "running", "boot_seconds": message["ready"]}
                self._publish()


def qemu_confinement(
    config: Mapping[str, Any], directory: VMDirectory, image: Path, manifest: Mapping[str, Any]
) -> Confinement:
    """Return QEMU's confinement: it may write its logs, read the image, and serve 9p shares.

    Its capabilities matter only if root starts it: none, except for files of other users.
    """
    shares = [(Path(path), writable) for path, writable in config["shares"].values()]
    capabilities = set()
    if any(writable for _, writable in shares):
        capabilities |= {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER}
    if any(Publish(**rule).host < FIRST_UNPRIVILEGED for rule in config["publish"]):
        capabilities.add(CAP_NET_BIND_SERVICE)
    files = [image / manifest[part]["file"] for part in ("kernel", "root")]
    if shares or any(file.stat().st_uid != os.geteuid() for file in files):
        capabilities.add(CAP_DAC_READ_SEARCH)
    writable = [directory.path, *(path for path, writable in shares if writable)]
    # The guest's memory is a file, too.
    size = max(QEMU_FILE_SIZE, max(config["memory"], config["max_memory"]) << 20)
    any_size = len(writable) > 1 or config["writable_disks"]
    return Confinement(frozenset(capabilities), None if any_size else size, writable)


def send(starter: JSONSocket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone, or has detached
        starter.send(message)


def main() -> None:
    """Keep one VM until it exits."""
    os.umask(0o077)
    confine_parent(SUPERVISOR)
    stop, wake = socket.socketpair()
    wake.setblocking(False)
    # Signals become events, which requires a Python handler.
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    if os.getpgrp() != os.getpid():  # run by hand: killing the VM's processes must not kill the shell's
        os.setsid()
    starter = JSONSocket(socket.socket(fileno=int(sys.argv[1])))
    config = starter.receive()
    if config is not None:
        send(starter, {"ended": Supervisor(config, starter, stop).run()})
        os._exit(0)  # whoever stopped the VM is waiting, and to take down the interpreter takes a quarter of a stop


if __name__ == "__main__":
    main()

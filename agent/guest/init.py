"""The duties of PID 1: mounts, console, modules, loopback at the start, and power-off at the end.

The guest's root is an initramfs or a read-only disk and is never written to afterwards; only /run and /tmp are.
Sources: Documentation/filesystems/ramfs-rootfs-initramfs.rst, cgroup-v2.rst, pivot_root(2).
"""

from __future__ import annotations

import os
import time

from caisson.agent.base import syscalls
from caisson.agent.base.syscalls import MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT
from caisson.proto.contract import CONSOLE_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

MODULES = "/lib/modules/caisson.list"
PATH = "/bin:/sbin:/usr/bin:/usr/sbin"

#: Where the root is bind-mounted before it is moved onto /.
ROOT_BIND = "/mnt"

#: source, target, type, flags, data; in this order.
MOUNTS: tuple[tuple[str, str, str, int, str | None], ...] = (
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, None),
    ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755"),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"),
    ("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
)


class DutyFailed(Exception):
    """A duty without which the guest cannot run; the text names it."""


def prepare(done: Callable[[str], object] = lambda duty: None) -> None:
    """Perform all duties in order, calling ``done`` after each.  Raises DutyFailed."""
    os.environ["PATH"] = PATH
    for duty in DUTIES:
        what = duty.__name__.replace("_", " ")
        try:
            duty()
        except OSError as error:
            raise DutyFailed(f"{what}: {error.filename or ''}: {os.strerror(error.errno or 0)}") from error
        done(what)


def leave_rootfs() -> None:
    """Make / a mount with a parent, as pivot_root requires: the kernel's initial root has none.

    A bind mount of the root, moved onto the root, is the same files with the initial mount below it.
    """
    syscalls.mount("/", ROOT_BIND, None, MS_BIND)
    os.chdir(ROOT_BIND)
    syscalls.mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def mount_all() -> None:
    """Mount proc, sysfs, devtmpfs, devpts and the tmpfs mounts; create the standard links in /dev."""
    for source, target, kind, flags, data in MOUNTS:
        if not os.path.isdir(target):  # noqa: PTH112 - no pathlib at start
            os.mkdir(target)  # noqa: PTH102
        syscalls.mount(source, target, kind, flags, data)
    if os.path.lexists("/dev/ptmx"):
        os.unlink("/dev/ptmx")  # noqa: PTH108
    os.symlink("pts/ptmx", "/dev/ptmx")  # noqa: PTH211
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")  # noqa: PTH211
    os.symlink("/proc/self/fd", "/dev/fd")  # noqa: PTH211


def open_console() -> None:
    """Open descriptors 0 to 2 on the console or /dev/null: no later file may become one of them."""
    try:
        for fd in range(3):
            os.fstat(fd)
        return
    except OSError:
        pass  # the kernel found no console when it started this program
    try:
        console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        console = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(console, fd)
    if console > 2:
        os.close(console)


def print_line(line: str) -> None:
    """Print a line on the console, or, where there is none, in the kernel's log."""
    try:
        os.write(1, f"{CONSOLE_PREFIX}{line}\n".encode(errors="replace"))
    except OSError:
        try:
            fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, f"<2>{CONSOLE_PREFIX}{line}".encode(errors="replace")[:900])
            os.close(fd)
        except OSError:
            pass  # no console and no kernel log


def load_modules() -> None:
    """Load the kernel modules that the image lists, in its order."""
    try:
        with open(MODULES) as lines:  # noqa: PTH123
            names = lines.read().split()
    except FileNotFoundError:
        return  # all are built in
    for name in names:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.finit_module(fd)
        except FileExistsError:
            pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error
        finally:
            os.close(fd)


def mount_cgroups() -> None:
    """Mount the cgroup version selected on the kernel command line."""
    from caisson.agent.guest import cgroupfs
    from caisson.agent.options import from_kernel, kernel_words

    if from_kernel(kernel_words()).cgroup == "v1":
        cgroupfs.mount_v1()
    else:
        cgroupfs.mount_v2()


def protect_agent() -> None:
    """Reserve memory and tasks for the agent."""
    from caisson.agent.guest import cgroupfs

    cgroupfs.protect_agent()


def seal_root() -> None:
    """Make the root read-only: this mount, and the file system below it."""
    syscalls.mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    syscalls.mount(None, "/", None, MS_REMOUNT | MS_RDONLY)


def loopback_up() -> None:
    """Bring lo up (netdevice(7), SIOCSIFFLAGS)."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # IFF_UP | IFF_RUNNING


def name_host() -> None:
    """Set the host name from /etc/hostname, or to localhost; sandboxes without a name keep it."""
    import socket

    try:
        with open("/etc/hostname") as file:  # noqa: PTH123
            words = file.read().split()
    except FileNotFoundError:
        words = []
    socket.sethostname(words[0] if words else "localhost")


def handle_keyboard() -> None:
    """Make Ctrl-Alt-Delete send SIGINT to this process instead of resetting the machine.  Source: reboot(2)."""
    syscalls.reboot(syscalls.RB_DISABLE_CAD)


DUTIES = (
    leave_rootfs, mount_all, open_console, handle_keyboard, name_host, load_modules, mount_cgroups, protect_agent,
    seal_root, loopback_up,
)  # fmt: skip


def power_off() -> NoReturn:
    """Sync and power the machine off."""
    print_line("powering off")
    os.sync()
    syscalls.reboot(syscalls.RB_POWER_OFF)
    while True:  # PID 1 must not return
        time.sleep(3600)

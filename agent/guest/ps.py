"""The output of ps(1) for given processes.  A guest has no ps, and needs none for one format.  Source: proc(5)."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Maximum bytes of one command line, and of all together: gRPC rejects a response of 4 MiB.  The kernel returns as much
#: as a process claims to have (PR_SET_MM, prctl(2)), from pages allocated for it.
MAX_COMMAND = 4096
MAX_COMMANDS = 1 << 20

#: The heading of `ps -ef`, with its widths.
HEADER = "UID          PID    PPID  C STIME TTY          TIME CMD"
TICKS = os.sysconf("SC_CLK_TCK")


def table(pids: Iterable[int]) -> str:
    """Return the lines of `ps -ef` for these processes, with its heading, without those that have just exited.

    UID is a number: the names of the guest's users are not the container's.  Reading a command line can take as long as
    the process wants, since it is its memory: call this in a thread.
    """
    now, uptime = time.time(), _uptime()
    lines = [HEADER]
    room = MAX_COMMANDS
    for pid in pids:
        try:
            lines.append(_line(pid, now, uptime, min(room, MAX_COMMAND)))
        except (OSError, ValueError, IndexError):
            continue
        room = max(0, room - len(lines[-1]))
    return "\n".join(lines) + "\n"


def _line(pid: int, now: float, uptime: float, room: int) -> str:
    """Return the line of a process, with as many bytes of its command line as there is room for; 0 for its name."""
    with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - a procfs file
        before, _, after = file.read(MAX_COMMAND).rpartition(b")")  # the name may have anything in it
    name = before.partition(b"(")[2].decode(errors="replace")
    fields = after.split()
    parent, tty, user, system, start = (int(fields[index]) for index in (1, 4, 11, 12, 19))
    words = _command(pid, room) if room else ""
    busy, age = (user + system) / TICKS, max(uptime - start / TICKS, 0.01)
    began = time.localtime(now - age)
    today = time.localtime(now)
    stime = time.strftime("%H:%M" if began[:3] == today[:3] else "%b%d" if began[0] == today[0] else "%Y", began)
    seconds = int(busy)
    cpu_time = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    owner = os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116
    share = min(int(busy / age * 100), 99)
    command = "".join(c if c.isprintable() else "?" for c in words or f"[{name}]")
    return f"{owner:<8} {pid:>7} {parent:>7} {share:>2} {stime:>5} {_terminal(tty):<8} {cpu_time} {command}"


def _command(pid: int, room: int) -> str:
    fd = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, room).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    finally:
        os.close(fd)


def _terminal(number: int) -> str:
    """Return a terminal's name, as far as its device number tells: pty slaves are majors 136 to 143 (devices.txt)."""
    major, minor = os.major(number), os.minor(number)
    if not number:
        return "?"
    if 136 <= major <= 143:
        return f"pts/{(major - 136) * 256 + minor}"
    return f"{major}:{minor}"


def _uptime() -> float:
    with open("/proc/uptime") as file:  # noqa: PTH123
        return float(file.read().split()[0])

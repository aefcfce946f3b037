"""What /proc/PID/stat tells of a process (proc_pid_stat(5))."""

from __future__ import annotations

from caisson.agent.base.record import Record

PF_FORKNOEXEC = 0x40  # include/linux/sched.h: forked, and nothing executed since
START_TIME, FLAGS = 19, 6  # fields after the name, from 0


class ProcessStat(Record):
    """One look at a process.

    `start_time` (clock ticks since boot) tells it from a later one with its pid; `state` is R, S, … Z for a zombie;
    `executed` is whether it has executed a program since it was forked.
    """

    start_time: int
    state: str
    executed: bool

    @classmethod
    def read(cls, pid: int) -> ProcessStat | None:
        """Look at a process; None if there is none."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - a procfs file
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return cls(int(fields[START_TIME]), fields[0].decode(), not int(fields[FLAGS]) & PF_FORKNOEXEC)

    @property
    def alive(self) -> bool:
        """Whether it runs, or can: it is not a zombie."""
        return self.state not in ("Z", "X")

"""The processes of one container that the agent started, by exec id."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager

from caisson.agent.base.errors import ProcessExists, ProcessExited, ProcessNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from caisson.agent.base.log import Log
    from caisson.agent.model.process import Process

#: Exited execs whose status and output are kept; the oldest are dropped first.
MAX_EXITED_EXECS = 256


class ProcessTable:
    """Init and the execs of a container: running ones, and exited ones whose status may still be asked for."""

    def __init__(self, container_id: str, log: Log) -> None:
        self._container_id = container_id
        self._log = log
        #: The first process, once there is one.
        self.init: Process | None = None
        self._processes: dict[str, Process] = {}
        self._starting: dict[str, asyncio.Event] = {}  # set when it is decided whether there is a process
        self._exited_execs: dict[str, None] = {}  # in the order in which they exited
        self._watchers: set[asyncio.Task[None]] = set()

    def find(self, exec_id: str) -> Process:
        """Return a process by its id; an empty id means init.  Raises ProcessNotFound."""
        process = self._processes.get(exec_id) if exec_id else self.init
        if process is None:
            raise ProcessNotFound(container_id=self._container_id, exec_id=exec_id)
        return process

    def running_pids(self) -> list[int]:
        """List the processes that have not exited."""
        return [process.child.pid for process in self._processes.values() if process.child.status is None]

    def add_init(self, process: Process, on_exit: Callable[[], Awaitable[object]]) -> None:
        """Add the container's first process; ``on_exit`` is called when it has exited."""
        self.init = process
        self._add(process, on_exit)

    @contextmanager
    def starting(self, exec_id: str) -> Iterator[None]:
        """Hold the id of an exec while it is being started, which `kill` waits for.  Raises ProcessExists."""
        if exec_id in self._processes or exec_id in self._starting:
            raise ProcessExists(container_id=self._container_id, exec_id=exec_id)
        decided = self._starting[exec_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._starting[exec_id]
            decided.set()

    def add_exec(self, process: Process) -> None:
        """Add an exec that has been started."""

        async def keep_latest() -> None:
            self._exited_execs[process.exec_id] = None
            while len(self._exited_execs) > MAX_EXITED_EXECS:
                oldest = next(iter(self._exited_execs))
                del self._exited_execs[oldest]
                self._processes.pop(oldest).release()

        self._add(process, keep_latest)

    def _add(self, process: Process, on_exit: Callable[[], Awaitable[object]]) -> None:
        async def watch() -> None:
            status = await process.wait()
            process.exited()
            self._log("debug", "process ended", exec_id=process.exec_id, status=status)
            await on_exit()

        self._processes[process.exec_id] = process
        task = asyncio.get_running_loop().create_task(watch())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    def signal(self, number: int) -> None:
        """Signal those that have not exited."""
        for process in self._processes.values():
            try:
                process.child.signal(number)
            except ProcessExited:
                continue

    async def kill(self) -> None:
        """Send SIGKILL to all, including those being started."""
        self.signal(signal.SIGKILL)
        for decided in list(self._starting.values()):
            await decided.wait()
        self.signal(signal.SIGKILL)

    async def release(self) -> None:
        """Wait until all have exited and release them; unread output is lost."""
        for process in list(self._processes.values()):
            await process.wait()
            process.release()

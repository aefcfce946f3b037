"""Bulk input and output of a process in a container: calls overlap, so that neither side waits for the other."""

from __future__ import annotations

import contextlib
import signal
from _queue import Empty, SimpleQueue

from caisson.agent.base.heap import raise_mmap_threshold
from caisson.agent.client.caller import OUTPUT_CHUNK
from caisson.agent.client.errors import AgentError
from caisson.agent.client.execute import LENGTH, ContainerProcess, exit_status, ignore, output, response
from caisson.agent.rpc.ttrpc.blocking import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from caisson.agent.client.guest import Machine
    from caisson.agent.rpc.ttrpc.frames import Buffer, Frame

    Answers = SimpleQueue[Frame | None]

#: Pieces of input on their way while the process takes an earlier one, and reads of output while one is handled here.
WRITES_AHEAD = 1
READS_AHEAD = 1

#: Bytes of output from which the process is taken to have more: reading ahead of a short one costs the guest a call.
FLOWING = 1 << 16

#: Seconds for a process that is told to stop to clean up and exit.
STOP_TIMEOUT = 1.5


class BulkProcess(ContainerProcess):
    """A process whose input and output are large.  One thread uses each stream; the order of the pieces is kept."""

    def __init__(self, machine: Machine, container_id: str) -> None:
        super().__init__(machine, container_id)
        raise_mmap_threshold()
        self._exit: Answers = SimpleQueue()
        self._written: Answers = SimpleQueue()
        self._writes = 0  # not answered
        self._reads: list[Answers] = []
        self._flows = False

    def start(self, document: Mapping[str, Any], timeout: float | None = None) -> None:
        super().start(document, timeout)
        self.post("WaitProcess", self._exit.put)

    def send(self, data: Buffer) -> None:
        """Send a piece of input, which can be overwritten then; waits for earlier ones.  Raises AgentError."""
        while self._writes > WRITES_AHEAD:
            self._await_write()
        self.post("WriteStdin", self._written.put, data=data)
        self._writes += 1

    def end_input(self) -> None:
        """Wait until all input is accepted, and close it.  Raises AgentError."""
        while self._writes:
            self._await_write()
        self.post("CloseStdin", ignore)

    def _await_write(self) -> None:
        self._writes -= 1
        response(take(self._written))

    def receive(self) -> memoryview:
        """Return the next piece of output; empty at its end.  Raises AgentError."""
        while len(self._reads) < 1 + self._flows * READS_AHEAD:
            answer: Answers = SimpleQueue()
            self.post("ReadStdout", answer.put, (LENGTH, OUTPUT_CHUNK))
            self._reads.append(answer)
        data = output(take(self._reads.pop(0)), "ReadStdout")
        self._flows = len(data) >= FLOWING
        return data

    def wait(self) -> int:
        """Wait for its exit; returns its status.  Raises AgentError."""
        return exit_status(take(self._exit))

    def stop(self) -> None:
        """Stop it, in whatever state it is; calls in progress end with AgentGone."""
        if not self._may_run:
            return
        self.signal_once(signal.SIGTERM)
        with contextlib.suppress(AgentError):
            self.post("CloseStdin", ignore)  # the shell sees the signal once its program has exited
            exit: Answers = SimpleQueue()
            self.post("WaitProcess", exit.put)
            try:
                exit.get(timeout=STOP_TIMEOUT)
            except Empty:
                self.signal_once(signal.SIGKILL)

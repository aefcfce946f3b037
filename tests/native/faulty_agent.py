"""Run the agent with an nsexec that stops at the point named in a file (agent/nsexec/faults.h): a program for tests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from caisson.agent.__main__ import main
from caisson.agent.libcontainer.process.nsexec import Nsexec

spawn = Nsexec.spawn


def spawn_faulty(
    self: Nsexec, stdio: tuple[int, int, int] | None, child_fds: Iterable[int], env: Mapping[str, str]
) -> int:
    point = Path(os.environ["CAISSON_FAULT_FILE"]).read_text()
    return spawn(self, stdio, child_fds, {**env, "_CAISSON_FAULT": point})


if __name__ == "__main__":
    Nsexec.spawn = spawn_faulty  # type: ignore[method-assign]
    main()

"""Commands that inspect containers: state, list, ps."""

from __future__ import annotations

import os
import sys

from caisson.agent.base.json import dumps
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.container import Container
from caisson.agent.libcontainer.state import OCI_VERSION, STOPPED
from caisson.agent.libcontainer.state_directory import ContainerError, list_ids
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from caisson.agent.libcontainer.state import State
    from caisson.agent.runtime.main import Call

COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
COLUMN_MIN, GAP = 12, 3  # as text/tabwriter pads them
FORMATS = ("table", "json")


def describe(container: Container, owner: str = "") -> dict[str, object]:
    """Describe a container as `state` and `list` print it."""
    return document(container.state, container.status, owner)


def document(state: State, status: str, owner: str = "") -> dict[str, object]:
    """Describe a state likewise, in the order of runc."""
    found: dict[str, object] = {
        "ociVersion": OCI_VERSION,
        "id": state.id,
        "pid": 0 if status == STOPPED else state.init_process_pid,
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
    }
    if state.labels:
        found["annotations"] = dict(state.labels)
    return found | {"owner": owner}


def state(call: Call) -> int:
    """Print the state of a container."""
    sys.stdout.write(dumps(describe(call.container()), 2))
    return 0


def list_containers(call: Call) -> int:
    """Print the containers below this root."""
    form = call.options.text("format")
    try:
        names = list_ids(call.root)
    except OSError as error:
        if call.root_given or not isinstance(error, FileNotFoundError):
            raise CommandError(f"open {call.root}: {(error.strerror or '').lower()}") from None
        names = []
    if call.options.flag("quiet"):
        for name in names:
            sys.stdout.write(f"{name}\n")
        return 0
    if form not in FORMATS:
        raise CommandError("invalid format option")
    found = [row for row in map(lambda name: _row(call, name), names) if row is not None]
    if form == "json":
        sys.stdout.write(dumps(found) if found else "null")
        sys.stdout.write("\n")
        return 0
    rows = [[str(row[key.lower()]) for key in COLUMNS] for row in found]
    sys.stdout.write(table([list(COLUMNS), *rows]))
    return 0


def _row(call: Call, name: str) -> dict[str, object] | None:
    try:
        container = Container.load(call.runtime, name)
        return describe(container, _owner(os.stat(container.directory).st_uid))  # noqa: PTH116
    except (ContainerError, OSError):  # being removed
        return None
    except SpecError as error:
        call.warn(f"load container {name}: {error}")
        return None


def _owner(uid: int) -> str:
    if uid == 0:
        return "root"
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows in columns."""
    widths = [max(COLUMN_MIN - GAP, *(len(row[number]) for row in rows)) + GAP for number in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("".join([*cells, row[-1]]) + "\n")
    return "".join(lines)


def ps(call: Call) -> int:
    """Print the processes of a container: their pids, or the lines of the host's ps(1)."""
    form = call.options.text("format")
    if form not in FORMATS:
        raise CommandError("invalid format option")
    container = call.container()
    pids = container.pids()
    if form == "json":
        sys.stdout.write(dumps(pids) if pids else "null")
        sys.stdout.write("\n")
        return 0
    import subprocess

    try:
        command = ["ps", *(call.operands[1:] or ["-ef"])]
        listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CommandError(f"ps: {(error.strerror or '').lower()}; install procps") from None
    if listed.returncode != 0:
        raise CommandError(f"exit status {listed.returncode}: {listed.stderr.strip() or listed.stdout.strip()}")
    lines = listed.stdout.splitlines()
    header = lines[0].split() if lines else []
    if "PID" not in header:
        raise CommandError("couldn't find PID field in ps output")
    column, wanted = header.index("PID"), {str(pid) for pid in pids}
    kept = [line for line in lines[1:] if len(line.split()) > column and line.split()[column] in wanted]
    sys.stdout.write("".join(f"{line}\n" for line in [lines[0], *kept]))
    return 0

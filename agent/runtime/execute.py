"""`exec`: another process in a container."""

from __future__ import annotations

from caisson.agent.base.json import JsonError, loads
from caisson.agent.libcontainer.state import PAUSED, STOPPED
from caisson.agent.libcontainer.waits import complete
from caisson.agent.runtime.bundle import read_config, read_process
from caisson.agent.runtime.errors import CommandError
from caisson.agent.runtime.stdio import ProcessIO, listen_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.container import Container
    from caisson.agent.runtime.main import Call
    from caisson.agent.runtime.prepared import Identity


def execute(call: Call) -> int:
    """Run a process in a container; unless detached, wait for its exit and exit with its status."""
    if call.options.flag("detach") is False and call.options.text("console-socket"):
        raise CommandError("cannot use console socket if runc will not detach or allocate tty")
    container = call.container()
    status = container.status
    if status == STOPPED:
        raise CommandError("cannot exec in a stopped container")
    if status == PAUSED and not call.options.flag("ignore-paused"):
        raise CommandError("cannot exec in a paused container (use --ignore-paused to override)")
    config = _identity(call, container)
    document = _document(call, container)
    process = read_process(call, document)
    if config is not None and (call.warned or config != _identity(call, container)):
        config = None
    return _run(call, container, process, config)


def _identity(call: Call, container: Container) -> Identity | None:
    """Return the bundle's config.json, if the process is the one it describes."""
    if call.options.given - {"detach"} or listen_environment():
        return None
    from caisson.agent.runtime.prepared import identity

    try:
        return identity(f"{container.state.bundle}/config.json")
    except OSError:
        return None


def _run(call: Call, container: Container, process: Process, config: Identity | None) -> int:
    from caisson.agent.libcontainer.process.launch import Launch
    from caisson.agent.runtime.cgroup import ExecCgroup

    detach = call.options.flag("detach")
    with ProcessIO(call, process, detach=detach) as io:
        with ExecCgroup(container, call.options.texts("cgroup")) as cgroup_fds:
            launch = Launch(container.id, io.stdio, cgroup_fds, io.preserved, io.announced, on_host=True)
            launched = complete(container.exec(process, launch))
        io.launched(launched)
        if config is not None:
            from caisson.agent.runtime.prepared import write_front_exec

            write_front_exec(container, process, config)
        return 0 if detach else io.follow(launched.child.pid)


def _document(call: Call, container: Container) -> dict[str, Any]:
    """Return the process as a document: from the given file, or the bundle's with this command line applied."""
    path = call.options.text("process")
    if path:
        document = _read(path)
    else:
        config = read_config(container.state.bundle)
        found = config.get("process")
        document = dict(found) if isinstance(found, dict) else {}
        document["args"] = call.operands[1:]
        document["terminal"] = False
        _override(call, document)
    _extend(document, "env", listen_environment())
    return document


def _extend(document: dict[str, Any], key: str, more: list[Any]) -> None:
    """Append to a list in a document; anything else is left for the parser to reject."""
    found = document.get(key)
    if more and (found is None or isinstance(found, list)):
        document[key] = [*(found or []), *more]


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
            found = loads(file.read())
    except OSError as error:
        raise CommandError(f"open {path}: {(error.strerror or '').lower()}") from None
    except (JsonError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise CommandError(f"{path}: must be a JSON object")
    return found


def _override(call: Call, document: dict[str, Any]) -> None:
    options = call.options
    if options.text("cwd"):
        document["cwd"] = options.text("cwd")
    if options.text("apparmor"):
        document["apparmorProfile"] = options.text("apparmor")
    if options.text("process-label"):
        document["selinuxLabel"] = options.text("process-label")
    if options.texts("cap"):
        _add_capabilities(document, options.texts("cap"))
    _extend(document, "env", options.texts("env"))
    if "tty" in options.given:
        document["terminal"] = options.flag("tty")
    if "no-new-privs" in options.given:
        document["noNewPrivileges"] = options.flag("no-new-privs")
    user = document.get("user") or {}
    if isinstance(user, dict):
        document["user"] = user | (_user(options.text("user")) if options.text("user") else {})
        _extend(document["user"], "additionalGids", options.numbers("additional-gids"))


def _add_capabilities(document: dict[str, Any], more: list[str]) -> None:
    """Add capabilities: ambient ones only if the configuration has inheritable ones."""
    sets = document.get("capabilities") or {}
    if isinstance(sets, dict):
        document["capabilities"] = sets = dict(sets)
        for name in ("bounding", "effective", "permitted", *(["ambient"] if sets.get("inheritable") else [])):
            _extend(sets, name, more)


def _user(text: str) -> dict[str, int]:
    uid, colon, gid = text.partition(":")
    found = {"uid": _number("uid", uid)}
    return found | {"gid": _number("gid", gid)} if colon else found


def _number(what: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise CommandError(f'bad {what}: strconv.Atoi: parsing "{text}": invalid syntax')
    return int(text)

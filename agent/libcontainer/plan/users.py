"""process.user.username, resolved by a container's /etc/passwd and /etc/group.

As in runc: "user" or "user:group", each a number or a name.  A number is never looked up as a name: an image with
such an entry could choose its ids (containerd CVE-2024-40635, crun CVE-2026-30892).
"""

from __future__ import annotations

import os

from caisson.agent.libcontainer.config.reader import U32_MAX, SpecError
from caisson.agent.libcontainer.plan.user_files import FIELD, UserFiles

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.config.spec import Linux

#: Maximum digits of an id.
MAX_DIGITS = 10

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
NAME_CHARACTERS = frozenset(f"{LETTERS}0123456789.-")


def needs_files(process: Process) -> bool:
    """Return whether `look_up` reads files of the container: for a name, or for a missing HOME."""
    return bool(process.user.username) or not has_home(process)


def look_up(process: Process, root: str) -> Process:
    """Return the process with its user resolved by the files of the root directory.  Raises SpecError."""
    try:
        files = UserFiles(root)
    except OSError as error:
        if process.user.username:
            raise SpecError(FIELD, f"the container's root cannot be looked into: {error.strerror}") from None
        return process if has_home(process) else _with_home(process, "/")
    with files:
        return _look_up(process, files)


def look_up_at_once(process: Process, root: str, rootfs: str) -> Process | None:
    """Look up as `look_up` does in a container's root, if that cannot block; None if it might.

    ``rootfs`` is its root as seen by this program: only files on that file system are read.  Raises SpecError.
    """
    try:
        with UserFiles(root, own=rootfs) as files:
            return _look_up(process, files)
    except OSError:
        return None


def _look_up(process: Process, files: UserFiles) -> Process:
    if process.user.username:
        process = resolve(process, files)
    return with_home(process, files)


def in_user_namespace() -> bool:
    """Return whether this program is in a user namespace other than the initial one."""
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
            return file.read().split() != ["0", "0", str((1 << 32) - 1)]
    except OSError:
        return False


def has_home(process: Process) -> bool:
    """Return whether its environment has a non-empty HOME."""
    homes = [variable for variable in process.env if variable.startswith("HOME=")]
    return bool(homes) and homes[-1] != "HOME="  # the last one counts


def resolve(process: Process, files: UserFiles) -> Process:
    """Return the process with the ids, groups and (unless it has one) HOME of its user name.

    USER: is USER, and :GROUP is root's, as for docker and podman.  Raises SpecError for an invalid name, or one unknown
    in the container.
    """
    user, _, group = process.user.username.partition(":")
    if not user and not group:
        raise SpecError(FIELD, f"{process.user.username!r} is neither USER nor USER:GROUP")
    user = user or "0"
    entry = _entry(files.table("etc/passwd", 7), user)
    groups = files.table("etc/group", 4)
    if entry is None and not user.isdecimal():
        raise SpecError(FIELD, f"unable to find user {user}: no matching entries in passwd file")
    uid = _id(user) if entry is None else _id(entry[2])
    gid, more = 0 if entry is None else _id(entry[3]), process.user.additional_gids
    if group:
        found = _entry(groups, group)
        if found is None and not group.isdecimal():
            raise SpecError(FIELD, f"unable to find group {group}: no matching entries in group file")
        gid = _id(group) if found is None else _id(found[2])
    elif entry is not None:
        more = (*more, *(_id(one[2]) for one in groups if entry[0] in one[3].split(",")))
    who = process.user.but(username="", uid=uid, gid=gid, additional_gids=tuple(dict.fromkeys(more)))
    if entry is not None and entry[5].startswith("/") and not any(value.startswith("HOME=") for value in process.env):
        return process.but(user=who, env=(*process.env, f"HOME={entry[5]}"))
    return process.but(user=who)


def with_home(process: Process, files: UserFiles) -> Process:
    """Return the process with a HOME: if missing or empty, that of its uid in /etc/passwd, otherwise "/"."""
    if has_home(process):
        return process
    try:
        table = files.table("etc/passwd", 7)
    except SpecError:
        table = []
    uid = str(process.user.uid)
    return _with_home(process, next((line[5] for line in table if line[2] == uid and line[5]), "/"))


def _with_home(process: Process, home: str) -> Process:
    env = tuple(variable for variable in process.env if not variable.startswith("HOME="))
    return process.but(env=(*env, f"HOME={home}"))


def mapped_root(linux: Linux) -> tuple[int, int] | None:
    """Return the outside ids of a container's root, or of its first id, if it has its own user namespace."""
    ids = [
        next((m.host_id for m in maps if m.container_id == 0), maps[0].host_id if maps else None)
        for maps in (linux.uid_mappings, linux.gid_mappings)
    ]
    return None if ids[0] is None or ids[1] is None else (ids[0], ids[1])


def map_writers(linux: Linux) -> tuple[tuple[str, str] | None, bool]:
    """Decide who writes the maps of a new user namespace, the runtime or helper programs, and whether setgroups is
    allowed.

    An unprivileged process may map only its own ids, and must deny setgroups(2); newuidmap and newgidmap write all
    other maps (user_namespaces(7)).  Raises SpecError if those are missing.
    """
    uid = os.geteuid()
    if uid == 0 or not linux.uid_mappings:
        return None, True
    own = [(m.host_id, m.size) for maps in (linux.uid_mappings, linux.gid_mappings) for m in maps]
    if own == [(uid, 1), (os.getegid(), 1)]:
        return None, False
    return (_program("newuidmap", "linux.uidMappings"), _program("newgidmap", "linux.gidMappings")), True


def _program(name: str, field: str) -> str:
    for directory in os.get_exec_path():
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    raise SpecError(field, f"need {name} (Debian: uidmap), for a runtime that is not root")


def _entry(table: list[list[str]], wanted: str) -> list[str] | None:
    """Return the first line for a number or a name.  Raises SpecError for anything else."""
    if wanted.isascii() and wanted.isdecimal():
        number = _id(wanted)
        return next((line for line in table if _is_id(line[2]) and int(line[2]) == number), None)
    name = wanted.removesuffix("$")
    if not name or name[0] not in LETTERS or not NAME_CHARACTERS.issuperset(name):
        raise SpecError(FIELD, f"{wanted!r} is neither a number nor a name")
    return next((line for line in table if line[0] == wanted), None)


def _is_id(text: str) -> bool:
    """Return whether it is a number that the kernel accepts as an id; the largest means "no change".

    int() rejects thousands of digits, and the text comes from the container.
    """
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS and int(text) < U32_MAX


def _id(text: str) -> int:
    if not _is_id(text):
        raise SpecError(FIELD, f"{text[:MAX_DIGITS]!r} is not an id: 0 to {U32_MAX - 1}")
    return int(text)

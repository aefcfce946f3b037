"""Mount options: words of fstab(5) into attributes of the mount API (mount_setattr(2)), propagation, and the rest."""

from __future__ import annotations

from functools import lru_cache

from caisson.agent.base.record import Record
from caisson.agent.libcontainer.config.reader import SpecError

RDONLY, NOSUID, NODEV, NOEXEC = 0x1, 0x2, 0x4, 0x8
NOATIME, STRICTATIME, ATIME, NODIRATIME, NOSYMFOLLOW = 0x10, 0x20, 0x70, 0x80, 0x200000
MS_REC, MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 0x4000, 1 << 17, 1 << 18, 1 << 19, 1 << 20

# option: (attributes to set, attributes to clear)
ATTRIBUTES: dict[str, tuple[int, int]] = {
    "ro": (RDONLY, 0), "rw": (0, RDONLY),
    "nosuid": (NOSUID, 0), "suid": (0, NOSUID),
    "nodev": (NODEV, 0), "dev": (0, NODEV),
    "noexec": (NOEXEC, 0), "exec": (0, NOEXEC),
    "noatime": (NOATIME, ATIME), "atime": (0, ATIME),
    "relatime": (0, ATIME), "norelatime": (0, ATIME),
    "strictatime": (STRICTATIME, ATIME), "nostrictatime": (0, ATIME),
    "nodiratime": (NODIRATIME, 0), "diratime": (0, NODIRATIME),
    "nosymfollow": (NOSYMFOLLOW, 0), "symfollow": (0, NOSYMFOLLOW),
}  # fmt: skip

PROPAGATION: dict[str, int] = {
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip

REFUSED = {
    "remount": "cannot be asked for: a container's mounts are new",
    "idmap": "is not supported",
    "ridmap": "is not supported",
    "loop": "is not supported: attach the image to a loop device first",
}


class MountOptions(Record):
    """A mount's options taken apart; `data` goes to the filesystem as it is."""

    bind: bool
    recursive: bool
    set: int
    clear: int
    recursive_set: int
    recursive_clear: int
    propagation: int
    data: tuple[str, ...]
    copy_up: bool = False


@lru_cache(maxsize=512)  # the same few for every container
def parse(options: tuple[str, ...], *, type_: str, where: str) -> MountOptions:
    """Take options apart; later ones win, as in mount(8).  Raises SpecError for what would be ignored."""
    bind, recursive, copy_up = type_ == "bind", False, False
    set_ = clear = recursive_set = recursive_clear = propagation = 0
    data: list[str] = []
    for option in options:
        if option in ("bind", "rbind"):
            bind, recursive = True, recursive or option == "rbind"
        elif option in ATTRIBUTES:
            on, off = ATTRIBUTES[option]
            set_, clear = (set_ & ~off) | on, (clear & ~on) | off
        elif option.startswith("r") and option[1:] in ATTRIBUTES:
            on, off = ATTRIBUTES[option[1:]]
            recursive_set, recursive_clear = (recursive_set & ~off) | on, (recursive_clear & ~on) | off
        elif option in PROPAGATION:
            if propagation not in (0, PROPAGATION[option]):
                raise SpecError(where, f"{option!r} is a second propagation type, and a mount has one")
            propagation = PROPAGATION[option]
        elif option.partition("=")[0] in REFUSED:
            raise SpecError(where, f"{option!r} {REFUSED[option.partition('=')[0]]}")
        elif option == "tmpcopyup" and type_ == "tmpfs":
            copy_up = True
        elif option == "tmpcopyup":
            raise SpecError(where, f"{option!r} is for tmpfs alone")
        elif option in ("", "defaults"):
            pass
        else:
            data.append(option)
    if bind and data:
        raise SpecError(where, f"{data[0]!r} has no meaning for a bind mount")
    for option in data:
        if len(option.partition("=")[2]) > 255:
            raise SpecError(where, f"the value of {option.partition('=')[0]!r} is longer than the 255 bytes that fit")
    return MountOptions(bind, recursive, set_, clear, recursive_set, recursive_clear, propagation, tuple(data), copy_up)

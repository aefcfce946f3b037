"""Hooks that are part of a guest image, in a directory that the host names when it creates the sandbox.

As in Kata's agent: DIRECTORY/prestart, /poststart and /poststop hold programs, run in the order of their names for
every container, after those of the container's own configuration.
"""

from __future__ import annotations

import os
import stat

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Hook, Hooks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.spec import Spec


class GuestHooks:
    """The hook programs below a directory of the guest; none if its name is empty or it does not exist."""

    def __init__(self, directory: str) -> None:
        """Raises OSError if the directory exists but cannot be read."""
        self._directory = directory
        self._prestart = self._find("prestart")
        self._poststart = self._find("poststart")
        self._poststop = self._find("poststop")

    def _find(self, point: str) -> tuple[Hook, ...]:
        place = f"{self._directory}/{point}"
        try:
            names = sorted(os.listdir(place)) if self._directory else []  # noqa: PTH208 - no pathlib at start
        except (FileNotFoundError, NotADirectoryError):
            return ()
        modes = {name: os.lstat(f"{place}/{name}").st_mode for name in names}
        return tuple(
            Hook(f"{place}/{name}", (name, point))
            for name, mode in modes.items()
            if stat.S_ISREG(mode) and mode & 0o111
        )

    def add_to(self, spec: Spec) -> Spec:
        """Return a configuration from the host with the guest's hooks after its own.

        Its own must also be programs below the directory: the author of a container's configuration (ultimately,
        through annotations, a user of the cluster: CVE-2020-27151) must not choose programs in the guest.  Raises
        SpecError.
        """
        own = spec.hooks
        for field, hooks in (
            ("prestart", own.prestart),
            ("createRuntime", own.create_runtime),
            ("createContainer", own.create_container),
            ("poststart", own.poststart),
            ("poststop", own.poststop),
        ):
            for index, hook in enumerate(hooks):
                if not self._has(hook.path):
                    raise SpecError(f"hooks.{field}[{index}].path", f"{hook.path!r} is not one of the guest's hooks")
        return spec.but(
            hooks=Hooks(
                prestart=(*own.prestart, *self._prestart),
                create_runtime=own.create_runtime,
                create_container=own.create_container,
                start_container=own.start_container,
                poststart=(*own.poststart, *self._poststart),
                poststop=(*own.poststop, *self._poststop),
            )
        )

    def _has(self, path: str) -> bool:
        place, program = os.path.realpath(self._directory), os.path.realpath(path)
        return bool(self._directory) and os.path.commonpath([place, program]) == place

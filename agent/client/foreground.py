"""Programs that somebody runs from a command line: their streams and exit status are the caller's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from caisson.agent.client import ocispec, rootdisk
from caisson.agent.client.attach import attach
from caisson.agent.client.connection import Agent, AgentError
from caisson.agent.client.defaults import PATH
from caisson.agent.client.errors import Mistake
from caisson.agent.client.guest import Guest, Machine
from caisson.proto.kata1 import oci_pb2


def user_ids(text: str) -> tuple[int, int]:
    """uid[:gid] as numbers; without one the group is 0.  Raises Mistake."""
    uid, _, gid = text.partition(":")
    if not uid.isascii() or not uid.isdecimal() or (gid and not (gid.isascii() and gid.isdecimal())):
        raise Mistake(f"--user takes numbers, uid or uid:gid, not {text!r}")
    return int(uid), int(gid or 0)


def check_settings(env: Iterable[str]) -> None:
    """Raises Mistake for what is not NAME=value."""
    for setting in env:
        if "=" not in setting:
            raise Mistake(f"--env takes NAME=value, not {setting!r}")


async def execute(
    machine: Machine,
    container_id: str,
    words: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    user: tuple[int, int] = (0, 0),
    terminal: bool = False,
) -> int:
    """Run a program in a container, which is made on first use; returns its exit status.

    Raises ProgramError when it cannot be run, and as `attach` does.
    """
    uid, gid = user
    environment = [PATH, "HOME=/root" if uid == 0 else "HOME=/", *_terminal(terminal), *env]
    async with Guest(machine) as guest:
        container = await guest.container(container_id)
        return await attach(await container.exec(words, env=environment, cwd=cwd, uid=uid, gid=gid, terminal=terminal))


def _terminal(terminal: bool) -> list[str]:
    return [f"TERM={os.environ.get('TERM', 'xterm')}"] if terminal else []


class ImageConfig(Protocol):
    """What an image says is to run: image.oci has it."""

    @property
    def env(self) -> Sequence[str]: ...

    @property
    def user(self) -> str: ...

    @property
    def workdir(self) -> str: ...

    def words(self, given: Sequence[str]) -> list[str]:
        """The program and its arguments; what is given takes the place of the image's command."""


def image_spec(
    config: ImageConfig,
    bundle: Mapping[str, Any],
    words: Sequence[str],
    *,
    env: Sequence[str],
    user: str,
    cwd: str,
    terminal: bool,
) -> oci_pb2.Spec:
    """What to run of an image, or of a bundle, if its config.json is not empty.  What is asked for takes the place of
    what they say.  Raises Mistake.
    """
    if not bundle:
        return rootdisk.image_spec(
            config.words(words),
            env=[*_terminal(terminal), *config.env, *env],
            user=user or config.user,
            cwd=cwd or config.workdir,
            terminal=terminal,
        )
    spec = ocispec.spec_from_bundle(dict(bundle))
    process = spec.Process
    if words:
        process.Args[:] = words
    process.Env.extend(env)
    process.Terminal |= terminal
    process.User.Username = user or process.User.Username
    process.Cwd = cwd or process.Cwd
    return spec


async def run_image(
    machine: Machine, container_id: str, spec: oci_pb2.Spec, pci_path: str, *, detach: bool
) -> int | None:
    """Run a container whose root is on a disk that is plugged in; returns its exit status.

    It is removed then, unless it is detached: it runs on, and there is no status yet.  Raises AgentError.
    """
    async with Agent.connect(machine.agent_socket) as agent:
        container = agent.container(container_id)
        running = False
        try:
            await rootdisk.create(agent, container_id, spec, pci_path, "squashfs")
            await container.start()
            if detach:
                running = True
                return None
            return await attach(container.init(terminal=spec.Process.Terminal))
        finally:
            if not running:
                with contextlib.suppress(AgentError):
                    await container.remove()

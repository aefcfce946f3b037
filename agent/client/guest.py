"""A VM and its agent together: what tasks.py is for the command line, for tests and programs of one's own.

Beside tasks.py the only place that uses both halves; nothing else of agent.client knows of image/.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from proto import generate

generate.ensure()

import image  # noqa: E402
from agent import client  # noqa: E402
from image.vm import VM, VMConfig, VMError  # noqa: E402
from image.vm.template import Template  # noqa: E402


@dataclass(frozen=True)
class Done:
    """A program that has ended: its exit status (128+n for signal n) and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


class Guest:
    """A guest from an image's directory (by default the default image, built if need be) or from a template's name.

    ``options`` are VMConfig's: memory, cpus, accel, vsock…  The VM ends with the block, or with this process.
    """

    def __init__(self, image: Path | None = None, *, template: str = "", name: str = "", **options: object) -> None:
        self._image = image
        self._template = template
        self._name = name or f"guest-{uuid.uuid4().hex[:8]}"
        self._options = options

    async def __aenter__(self) -> Self:
        """Raises VMError and ImageError."""
        self.vm: VM = await asyncio.to_thread(self._start)
        self.agent = client.Agent.connect(self.vm.agent_socket)
        await self.agent.create_sandbox()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agent.__aexit__()
        await asyncio.to_thread(self.vm.stop)

    def _start(self) -> VM:
        if self._template:
            template = Template.load(self._template)
            if template is None:
                raise VMError(f"there is no template {self._template!r}")
            config = VMConfig.clone(template, name=self._name, **self._options)
            return VM.start(config, ready=partial(client.settled, hostname=self._name))
        directory = self._image or image.build(report=lambda line: None).directory
        config = VMConfig(directory, name=self._name, **self._options)  # type: ignore[arg-type]
        return VM.start(config, ready=partial(client.answers, timeout=1.0))

    async def container(self, container_id: str = "default") -> client.Container:
        """The container of this id, made from the root file system in the image on first use."""
        contents = json.loads((self.vm.directory / "image.json").read_text())
        return await self.agent.ensure_container(container_id, client.default_spec(contents["containers"]["busybox"]))

    async def run(self, *words: str | os.PathLike[str], container: str = "default", stdin: bytes = b"") -> Done:
        """Run a program in a container to its end.  Raises ProgramError when it cannot be run."""
        process = await (await self.container(container)).exec([os.fspath(word) for word in words], env=[client.PATH])

        async def feed() -> None:
            if stdin:
                await process.write(stdin)
            await process.close_stdin()

        async def collect(errors: bool) -> bytes:
            return b"".join([data async for data in (process.stderr() if errors else process.stdout())])

        _, stdout, stderr = await asyncio.gather(feed(), collect(False), collect(True))
        return Done(await process.wait(), stdout, stderr)

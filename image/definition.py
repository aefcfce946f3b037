"""The image definition: a YAML file, rendered by jinja2, then checked into a frozen Definition."""

from __future__ import annotations

import difflib
import platform
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import yaml

from image.errors import ImageError
from image.initrd import COMPRESSORS

TEMPLATES = Path(__file__).resolve().parent.parent / "rootfs-templates"
DEFAULT = TEMPLATES / "debian" / "image.yaml"
DEFAULT_SUITE = "trixie"

#: Debian's names for what `uname -m` says.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class DefinitionError(ImageError):
    """A definition says something that is not understood; the text names the file, the key and what would be right."""


@dataclass(frozen=True)
class KernelDefinition:
    """``kernel``: the package that brings it, and the fragments that it must satisfy."""

    package: str
    fragments: tuple[str, ...]


@dataclass(frozen=True)
class Definition:
    """What an image is made of; the comments in rootfs-templates/debian/image.yaml say what each key means."""

    name: str
    suite: str
    arch: str
    python: str
    packages: tuple[str, ...]
    wheels: tuple[str, ...]
    busybox: str
    kernel: KernelDefinition
    compression: str
    cmdline: str
    sources: bool = False
    prune: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def triplet(self) -> str:
        """The directory of libraries below /usr/lib."""
        return {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[self.arch]


def host_architecture() -> str:
    """Debian's name for this machine's architecture.  Raises DefinitionError for one that is not supported."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise DefinitionError(f"images are made for {' and '.join(ARCHITECTURES)}, not for {machine}")
    return ARCHITECTURES[machine]


def load(file: Path = DEFAULT, *, suite: str | None = None) -> tuple[Definition, Path]:
    """Read a definition; returns it with the template directory it is in.  Raises DefinitionError."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        text = environment.from_string(file.read_text()).render(suite=suite or DEFAULT_SUITE, arch=host_architecture())
        document = yaml.safe_load(text)
    except OSError as error:
        raise DefinitionError(f"the definition cannot be read: {error}") from error
    except jinja2.TemplateError as error:
        known = " (is the suite one that the template knows?)" if isinstance(error, jinja2.UndefinedError) else ""
        raise DefinitionError(f"{file}: {error}{known}") from error
    except yaml.YAMLError as error:
        raise DefinitionError(f"{file}: {error}") from error
    values = _checked(Definition, document, str(file), "")
    values["kernel"] = KernelDefinition(**_checked(KernelDefinition, values["kernel"], str(file), "kernel."))
    if values["compression"] not in COMPRESSORS:
        raise DefinitionError(f"{file}: compression is one of {', '.join(COMPRESSORS)}, not {values['compression']!r}")
    if values["arch"] != (arch := host_architecture()):
        raise DefinitionError(f"{file}: arch is {values['arch']!r}, but this machine makes images for {arch}")
    if suite and values["suite"] != suite:
        raise DefinitionError(f"{file}: its suite is fixed to {values['suite']}; `{{{{ suite }}}}` would take {suite}")
    return Definition(**values), file.parent


def _checked(kind: type, document: object, file: str, prefix: str) -> dict[str, Any]:
    """The keys of a mapping against a dataclass's fields: names, presence and types."""
    if not isinstance(document, dict):
        raise DefinitionError(f"{file}: {prefix.rstrip('.') or 'the definition'} must be a mapping")
    known = {field.name: field for field in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are: {', '.join(known)}"
            raise DefinitionError(f"{file}: {prefix}{key} is not a key of a definition{hint}")
        wanted = str(known[key].type)
        if wanted.startswith("tuple"):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise DefinitionError(f"{file}: {prefix}{key} must be a list of strings, not {value!r}")
            value = tuple(value)
        elif wanted == "str" and not isinstance(value, str):
            raise DefinitionError(f"{file}: {prefix}{key} must be a string, not {value!r}; quotes make it one")
        elif wanted == "bool" and not isinstance(value, bool):
            raise DefinitionError(f"{file}: {prefix}{key} must be true or false, not {value!r}")
        values[key] = value
    for name, field in known.items():
        if name not in values and field.default is MISSING:
            raise DefinitionError(f"{file}: {prefix}{name} is missing")
    return values

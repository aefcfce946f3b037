"""The image definition: YAML, rendered by jinja2, merged over what it extends, then validated into a frozen
Definition.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import platform
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from caisson.image.build import settings as declared
from caisson.image.build.choices import COMPRESSORS, DISTRIBUTIONS, ROOT_FORMATS
from caisson.image.build.settings import DefinitionError, merge, override, parse_settings, section, setting

TEMPLATES = Path(__file__).resolve().parents[2] / "rootfs-templates"
DEFAULT = TEMPLATES / "debian" / "image.yaml"
DEFAULT_SUITE = "trixie"

#: Debian's names for what `uname -m` says.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

#: Formats of the guest's root; all but the first are file systems on a disk.
FORMATS = ("initrd", *ROOT_FORMATS)

#: Layouts of a disk: only the file system, with a partition table, or as Kata's hosts map it into the guest.
LAYOUTS = ("plain", "gpt", "dax")

#: Bytes in a unit of a limit.
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class KernelDefinition:
    """``kernel``: its required fragments, and its origin."""

    fragments: tuple[str, ...] = setting("requirements: names of rootfs-templates/kernel/*.conf, or paths")
    package: str = setting("a package with a bootable kernel", default="")
    source: str = setting("or a source package or directory to compile it from", default="")


@dataclass(frozen=True)
class Limits:
    """``limits``: sizes like 24 MB; a build that exceeds one fails and names the largest files."""

    image: str = setting("maximum size of the packed root", default="")
    tree: str = setting("maximum size of all files in it, unpacked", default="")
    kernel: str = setting("maximum size of the compressed kernel", default="")

    def bytes_of(self, name: str) -> int | None:
        """Parse a limit into bytes; None if there is none.  Raises DefinitionError for an invalid size."""
        text = getattr(self, name)
        if not text:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|MB|GB|)", text)
        if not found:
            raise DefinitionError(f"limits.{name}: {text!r} is not a size; for example 24 MB")
        return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class Definition:
    """The definition of an image; rootfs-templates/debian/image.yaml shows each key with its reasons."""

    name: str = setting("name of the image")
    suite: str = setting("the distribution's release")
    arch: str = setting("architecture, by Debian's name for it")
    python: str = setting("the version of the guest's interpreter, for example 3.13")
    packages: tuple[str, ...] = setting("packages to unpack, with all their dependencies")
    wheels: tuple[str, ...] = setting("from PyPI, pinned and with --hash=sha256:… each, for the guest's interpreter")
    busybox: str = setting("the package with a static busybox, for the container rootfs of `caisson exec`")
    kernel: KernelDefinition = section(KernelDefinition, "the kernel")
    cmdline: str = setting("kernel command line, without what the machine adds")
    distribution: str = setting(
        "distribution that the packages come from", default="debian", choices=tuple(DISTRIBUTIONS)
    )
    init: str = setting("what runs as process 1", default="agent", choices=("agent", "systemd"))
    format: str = setting("format of the packed root", default="initrd", choices=FORMATS)
    compression: str = setting("compression of an initrd", default="none", choices=tuple(COMPRESSORS))
    layout: str = setting("layout of a disk", default="plain", choices=LAYOUTS)
    verity: bool = setting("check every block of a disk's root against a hash tree (dm-verity)", default=False)
    files: Mapping[str, str] = setting("additional files: path in the guest → path beside the definition", default={})
    hooks: tuple[str, ...] = setting("programs beside the definition, run with the tree as their argument", default=())
    limits: Limits = section(Limits, "maximum sizes")
    sources: bool = setting("keep Python sources beside the byte code", default=False)
    prune: tuple[str, ...] = setting("paths in the guest to remove, as shell patterns", default=())
    keep: tuple[str, ...] = setting("exceptions from prune, and libraries that are loaded by name", default=())

    @property
    def triplet(self) -> str:
        """GNU's name of the architecture."""
        return {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[self.arch]

    @property
    def is_foreign(self) -> bool:
        """Whether the guest's architecture differs, so that this machine cannot run its programs."""
        return self.arch != host_architecture()

    def native(self) -> Definition:
        """Return the definition for this machine's own architecture, for programs that a cross-build runs."""
        return dataclasses.replace(self, arch=host_architecture())

    @property
    def libraries(self) -> str:
        """The directory of the C library in a tree."""
        return DISTRIBUTIONS[self.distribution].libraries.format(triplet=self.triplet)


@dataclass(frozen=True)
class Loaded:
    """A definition with the directories of the files that it was read from, base templates first."""

    definition: Definition
    templates: tuple[Path, ...]

    def beside(self, name: str) -> Path:
        """Return a file named by a definition: the last template that has it wins.  Raises DefinitionError."""
        for place in reversed(self.templates):
            if (place / name).exists():
                return place / name
        raise DefinitionError(f"{name}: is not in {' or '.join(map(str, self.templates))}")


def host_architecture() -> str:
    """Return Debian's name for this machine's architecture.  Raises DefinitionError for an unsupported one."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise DefinitionError(f"{machine}: images cannot be built for it, only for {' and '.join(ARCHITECTURES)}")
    return ARCHITECTURES[machine]


def schema() -> dict[str, Any]:
    """Return the JSON schema of a definition (after rendering, and merged over what it extends)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | declared.schema(Definition)


def find(name: str) -> Path:
    """Find a definition by name: one of our templates, a directory with an image.yaml, or a file.

    Raises DefinitionError.
    """
    ours = {file.parent.name: file for file in TEMPLATES.glob("*/image.yaml")}
    if name in ours:
        return ours[name]
    for file in (Path(name), Path(name) / "image.yaml"):
        if file.is_file():
            return file
    raise DefinitionError(
        f"template {name!r}: does not exist; name a file, a directory, or one of {', '.join(sorted(ours))}"
    )


def _defined(file: Path, document: Mapping[str, Any], settings: Sequence[str]) -> Definition:
    """Validate a definition with ``settings`` applied; an error names these if the file alone is valid."""
    complete = functools.reduce(merge, map(override, settings), dict(document))
    try:
        return typing.cast(Definition, parse_settings(Definition, complete, str(file)))
    except DefinitionError:
        if settings:
            parse_settings(Definition, document, str(file))
            parse_settings(Definition, complete, f"--set {' '.join(settings)}")
        raise


def load(
    file: Path = DEFAULT, *, suite: str | None = None, arch: str | None = None, settings: Sequence[str] = ()
) -> Loaded:
    """Read a definition; ``settings`` are KEY=VALUE strings and override the file.  ``arch`` is Debian's name of the
    guest's architecture, this machine's unless given.  Raises DefinitionError.
    """
    given = {"suite": suite or DEFAULT_SUITE, "chosen": suite or "", "arch": arch or host_architecture()}
    document, templates = _read(file, given, ())
    definition = _defined(file, document, settings)
    if bool(definition.kernel.package) == bool(definition.kernel.source):
        raise DefinitionError(f"{file}: a kernel is either a package or a source; give one, not both")
    if definition.arch not in ARCHITECTURES.values():
        raise DefinitionError(f"{file}: arch is {definition.arch!r}; there are {' and '.join(ARCHITECTURES.values())}")
    if arch and definition.arch != arch:
        raise DefinitionError(f"{file}: its arch is fixed to {definition.arch}; `{{{{ arch }}}}` would take {arch}")
    if definition.is_foreign and (definition.distribution != "debian" or definition.kernel.source):
        raise DefinitionError(
            f"{file}: images for another architecture ({definition.arch}) are made of Debian's packages, with a kernel "
            "of theirs; choose --template debian, or build on such a machine"
        )
    if suite and definition.suite != suite:
        raise DefinitionError(f"{file}: its suite is fixed to {definition.suite}; `{{{{ suite }}}}` would take {suite}")
    if definition.format == "initrd" and (definition.verity or definition.layout != "plain"):
        raise DefinitionError(f"{file}: verity and layout need a disk; choose a format of {', '.join(FORMATS[1:])}")
    if definition.layout == "dax" and not ROOT_FORMATS[definition.format].dax:
        able = ", ".join(name for name, format in ROOT_FORMATS.items() if format.dax)
        raise DefinitionError(f"{file}: layout dax needs a format that can be mapped: {able}, not {definition.format}")
    if definition.kernel.source and "/" not in definition.kernel.source and not _kernel_sources(definition):
        raise DefinitionError(f"{file}: {definition.distribution} has no kernel sources in packages; name a directory")
    for name in ("image", "tree", "kernel"):
        definition.limits.bytes_of(name)
    _check_names(definition, file)
    return Loaded(definition, templates)


def _check_names(definition: Definition, file: Path) -> None:
    """Check what becomes a path in the guest's tree, or a word of a package manager's command line."""
    for key, patterns in (("prune", definition.prune), ("keep", definition.keep)):
        for pattern in patterns:
            if not _is_inside(pattern):
                raise DefinitionError(
                    f"{file}: {key}: {pattern!r} is not a path in the guest; write usr/share/doc, without a leading /"
                )
    for name in definition.files:
        if not _is_inside(name.lstrip("/")):
            raise DefinitionError(f"{file}: files: {name!r} is not the path of a file in the guest")
    for key in ("packages", "busybox", "kernel.package"):
        value = operator.attrgetter(key)(definition)
        for name in (value,) if isinstance(value, str) else value:
            if name.startswith("-") or len(name.split()) > 1:
                raise DefinitionError(f"{file}: {key}: {name!r} is not the name of a package")


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return not ("\0" in path or "" in parts[:1] or ".." in parts or path.strip("./") == "")


def _kernel_sources(definition: Definition) -> bool:
    return DISTRIBUTIONS[definition.distribution].kernel_sources


class _Undefined(jinja2.StrictUndefined):
    """An undefined value in a template, which is an error; for a mapping (of suites, say) it lists the known keys."""

    @property
    def _undefined_message(self) -> str:
        if isinstance(self._undefined_obj, dict):
            return f"{self._undefined_name!r}: unknown; known are: {', '.join(map(str, self._undefined_obj))}"
        return super()._undefined_message


def rendered(file: Path, values: Mapping[str, Any], environment: jinja2.Environment) -> str:
    """Render a file by jinja2.  Raises OSError, and DefinitionError with the file's name for anything else."""
    try:
        return environment.from_string(file.read_text(encoding="utf-8")).render(values)
    except UnicodeDecodeError as error:
        raise DefinitionError(f"{file}: is not UTF-8 at byte {error.start}") from error
    except OSError:
        raise
    except Exception as error:  # expressions in it may raise anything
        line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise DefinitionError(f"{file}{line}: {error}") from error


def _read(file: Path, given: Mapping[str, str], below: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Read a file's mapping, merged over the template it extends, and the directories of both."""
    file = file.resolve()
    if file in below:
        raise DefinitionError(f"{file}: extends itself, by {' → '.join(map(str, below))}")
    environment = jinja2.Environment(undefined=_Undefined, autoescape=False)
    try:
        document = yaml.safe_load(rendered(file, given, environment))
    except OSError as error:
        raise DefinitionError(f"the definition cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that there is not
        raise DefinitionError(f"{file}: {error}") from error
    except RecursionError:
        raise DefinitionError(f"{file}: nested too deeply") from None
    if not isinstance(document, dict):
        raise DefinitionError(f"{file}: the definition must be a mapping")
    parent = document.pop("extends", None)
    if parent is None:
        return document, (file.parent,)
    beside = file.parent / str(parent)
    # The base template is rendered with the definition's values of these.
    said = {name: document[name] for name in ("suite", "python") if isinstance(document.get(name), str)}
    if "suite" in said:
        said["chosen"] = said["suite"]
    base, templates = _read(find(str(beside if beside.exists() else parent)), {**given, **said}, (*below, file))
    return merge(base, document), (*templates, file.parent)

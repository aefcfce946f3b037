"""image.json: the contents of an image, stored beside it and inside it.  The VM half reads nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from caisson.image.build.definition import Definition
from caisson.image.kernel.kernel import Kernel
from caisson.proto.contract import BUSYBOX_ROOTFS

FORMAT = 2


def plain(definition: Definition) -> dict[str, Any]:
    """Return a definition as JSON values."""

    def value(item: Any) -> Any:
        if dataclasses.is_dataclass(item):
            return {field.name: value(getattr(item, field.name)) for field in dataclasses.fields(item)}
        if isinstance(item, Mapping):
            return dict(item)
        return list(item) if isinstance(item, tuple) else item

    return dict(value(definition))


def contents(
    definition: Definition, key: str, kernel: Kernel, packages: list[dict[str, str]], agent: str
) -> dict[str, Any]:
    """Return the part of the document known before the image is packed."""
    # Readers assume Debian if an image does not name its distribution.
    distribution = {} if definition.distribution == "debian" else {"distribution": definition.distribution}
    return {
        "format": FORMAT,
        "name": definition.name,
        "key": key,
        "suite": definition.suite,
        "arch": definition.arch,
        **distribution,
        "init": definition.init,
        "cmdline": definition.cmdline,
        "agent": {"version": agent},
        "kernel": {
            "file": kernel.file.name,
            "release": kernel.release,
            "sha256": hashlib.sha256(kernel.file.read_bytes()).hexdigest(),
            "config_sha256": kernel.config_sha256,
            "modules": list(kernel.modules),
            "missing": list(kernel.missing),
            "shares": kernel.shared_file_systems(),
        },
        "packages": sorted(packages, key=lambda package: (package["type"], package["name"])),
        "containers": {"busybox": BUSYBOX_ROOTFS},
    }


def osbuilder(document: Mapping[str, Any], definition: Definition) -> str:
    """Return osbuilder.yaml, format 0.0.2, which Kata's tools look for in /var/lib/osbuilder (kata-collect-data.sh)."""
    description = {
        "osbuilder": {"url": "", "version": document["agent"]["version"]},
        "rootfs-creation-time": "1970-01-01T00:00:00+00:00",
        "description": f"caisson image {document['name']}, {document['key']}",
        "file-format-version": "0.0.2",
        "architecture": {"amd64": "x86_64", "arm64": "aarch64"}[document["arch"]],
        "base-distro": {
            "name": definition.distribution.capitalize(),
            "version": document["suite"],
            "packages": {
                "default": [
                    f"{one['name']}={one['version']}" for one in document["packages"] if one["type"] != "wheel"
                ],
                "extra": [f"{one['name']}={one['version']}" for one in document["packages"] if one["type"] == "wheel"],
            },
        },
        "agent": {
            "url": "",
            "name": "caisson-agent",
            "version": document["agent"]["version"],
            "agent-is-init-daemon": "yes" if definition.init == "agent" else "no",
        },
    }
    return yaml.safe_dump(description, sort_keys=False)


def write(document: dict[str, Any], file: Path) -> None:
    """Write a document as human-readable JSON."""
    file.write_text(json.dumps(document, indent=2) + "\n")

"""Build container images from busybox alone, in every common format."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Member = tuple[str, dict[str, Any]]

FOLDER: dict[str, Any] = {"type": tarfile.DIRTYPE, "mode": 0o755}


def file(data: bytes = b"", **fields: Any) -> dict[str, Any]:
    return {"data": data, **fields}


def link(target: str) -> dict[str, Any]:
    return {"type": tarfile.SYMTYPE, "linkname": target, "mode": 0o777}


def hard_link(target: str) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE, "linkname": target}


def layer(*members: Member) -> bytes:
    """Return a layer's archive: names with their fields, `data` for contents and `xattrs` for attributes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, fields in members:
            fields = dict(fields)
            data = fields.pop("data", b"")
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.pax_headers = len(data), 0o644, {}
            for attribute, value in fields.pop("xattrs", {}).items():
                member.pax_headers[f"SCHILY.xattr.{attribute}"] = value.decode("utf-8", "surrogateescape")
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def hosts_busybox() -> bytes:
    """Return this machine's busybox."""
    program = shutil.which("busybox")
    assert program is not None
    return Path(program).read_bytes()


def busybox_layer(program: bytes | None = None) -> bytes:
    """Return a layer with busybox (this machine's, or a given one), links for the applets tests call, and users."""
    applets = ("sh", "cat", "id", "ls", "pwd", "env", "echo", "stat", "touch", "sleep", "readlink", "tar", "test")
    return layer(
        ("bin", FOLDER),
        ("bin/busybox", file(program or hosts_busybox(), mode=0o755)),
        *((f"bin/{name}", link("busybox")) for name in applets),
        ("etc", FOLDER),
        ("etc/passwd", file(b"root:x:0:0::/root:/bin/sh\nweb:x:1234:2345::/srv/web:/bin/sh\n")),
        ("etc/group", file(b"root:x:0:\nweb:x:2345:\nlogs:x:3456:web\n")),
        ("tmp", FOLDER | {"mode": 0o1777}),
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def configuration(layers: Sequence[bytes], architecture: str = "amd64", **config: Any) -> bytes:
    """Return an image configuration; `config` holds its runtime settings."""
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(one)}" for one in layers]},
    }
    return json.dumps(document).encode()


def oci_layout(target: Path, layers: Sequence[bytes], architecture: str = "amd64", **config: Any) -> Path:
    """Write an OCI image layout, with gzip-compressed layers."""
    blobs = target / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        (blobs / sha256(data)).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{sha256(data)}", "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "config": blob(configuration(layers, architecture, **config), "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(gzip.compress(one, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip") for one in layers],
    }
    described = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return target


def packed_directory(target: Path, source: Path) -> Path:
    """Pack a directory into an archive."""
    with tarfile.open(target, "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.add(path, arcname=str(path.relative_to(source)), recursive=False)
    return target


def docker_archive(target: Path, layers: Sequence[bytes], **config: Any) -> Path:
    """Write the format of `docker save` before it switched to OCI image layouts."""
    document = configuration(layers, **config)
    names = [f"{sha256(one)}/layer.tar" for one in layers]
    manifest = [{"Config": f"{sha256(document)}.json", "RepoTags": ["test:latest"], "Layers": names}]
    members: list[Member] = [(f"{sha256(document)}.json", file(document))]
    members += [(name, file(one)) for name, one in zip(names, layers, strict=True)]
    members.append(("manifest.json", file(json.dumps(manifest).encode())))
    target.write_bytes(layer(*members))
    return target

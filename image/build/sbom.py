"""A software bill of materials: SPDX 2.3 as JSON, derived only from an image's manifest, so always the same.

Sources: the SPDX 2.3 specification (spdx.github.io/spdx-spec/v2.3) and its JSON schema; the package-URL specification.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from caisson.image.packages.contents import REFERENCE, references

#: Namespace of a document that need not be published: .invalid is reserved (RFC 2606), the digest makes it unique.
NAMESPACE = "https://caisson.invalid/spdx"

#: The kernel's licence (its COPYING), and this project's.
LINUX, OURS = "GPL-2.0-only WITH Linux-syscall-note", "Apache-2.0"

#: Placeholder text of a licence that SPDX does not know.
EXTRACTED = "as in the copyright file of the package that declares it"

#: For facts that the manifest lacks.
_UNKNOWN = "NOASSERTION"


def document(manifest: Mapping[str, Any], *, created: int = 0) -> dict[str, Any]:
    """Return the SPDX document of an image whose image.json is ``manifest``; ``created`` is in seconds since 1970."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    name = f"{manifest['name']}-{manifest['suite']}-{manifest['arch']}"
    image = _package("image", name, manifest["key"], "", purpose="OPERATING-SYSTEM")
    kernel, version = manifest["kernel"], manifest["agent"]["version"]
    contents = [
        _package("kernel", "linux", kernel["release"], LINUX, sha256=kernel["sha256"], purpose="OPERATING-SYSTEM"),
        _package("agent", "caisson-agent", version, OURS, purpose="APPLICATION"),
    ]
    for record in manifest["packages"]:
        contents.append(
            _package(
                record["type"], record["name"], record["version"], record.get("license", ""), sha256=record["sha256"],
                locator=_purl(record, manifest), purpose="LIBRARY" if record["type"] == "wheel" else None,
            )
        )  # fmt: skip
    # Keyed by identifier: sorted, without duplicates.
    contents = [package for _, package in sorted({str(package["SPDXID"]): package for package in contents}.items())]
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": f"{NAMESPACE}/{name}-{digest}",
        "creationInfo": {
            "created": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": ["Tool: caisson"],
        },
        "packages": [image, *contents],
        "relationships": [
            _relation("SPDXRef-DOCUMENT", "DESCRIBES", image["SPDXID"]),
            *(_relation(image["SPDXID"], "CONTAINS", package["SPDXID"]) for package in contents),
        ],
    }
    others = references(package["licenseDeclared"] for package in contents)
    if others:  # the specification requires a text of each, which is in the packages
        document["hasExtractedLicensingInfos"] = [
            {"licenseId": one, "name": one.removeprefix(REFERENCE), "extractedText": EXTRACTED} for one in others
        ]
    return document


def write(manifest: Mapping[str, Any], file: Path, *, created: int = 0) -> None:
    """Write the document as human-readable JSON."""
    file.write_text(json.dumps(document(manifest, created=created), indent=2) + "\n", encoding="utf-8")


def _package(
    kind: str,
    name: str,
    version: str,
    declared: str,
    *,
    sha256: str = "",
    locator: str = "",
    purpose: str | None = None,
) -> dict[str, Any]:
    # An identifier has letters, digits, dots and hyphens only; dropping other characters would make two names one.
    readable = re.sub(r"[^A-Za-z0-9.-]", "-", f"{kind}-{name}")
    unique = hashlib.sha256(f"{kind} {name} {version}".encode()).hexdigest()[:8]
    package: dict[str, Any] = {
        "SPDXID": f"SPDXRef-Package-{readable}-{unique}",
        "name": name,
        "versionInfo": version,
        "downloadLocation": _UNKNOWN,
        "filesAnalyzed": False,
        "licenseConcluded": _UNKNOWN,
        "licenseDeclared": declared or _UNKNOWN,
        "copyrightText": _UNKNOWN,
    }
    if purpose:
        package["primaryPackagePurpose"] = purpose
    if sha256:
        package["checksums"] = [{"algorithm": "SHA256", "checksumValue": sha256}]
    if locator:
        package["externalRefs"] = [
            {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": locator}
        ]
    return package


def _purl(record: Mapping[str, str], manifest: Mapping[str, Any]) -> str:
    """Return a package URL, by which scanners look up vulnerabilities."""
    if record["type"] == "wheel":
        name = re.sub(r"[-_.]+", "-", record["name"]).lower()
        return f"pkg:pypi/{name}@{quote(record['version'], safe='~')}"
    distribution = quote(manifest.get("distribution", "debian"))
    where = f"arch={quote(manifest['arch'])}&distro={quote(manifest['suite'])}"
    name = quote(record["name"], safe="")
    return f"pkg:{quote(record['type'])}/{distribution}/{name}@{quote(record['version'], safe='~')}?{where}"


def _relation(element: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": element, "relationshipType": kind, "relatedSpdxElement": other}

"""Test the bill of materials: each package once, with what scanners need, and reproducible."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build import sbom

SHA = "0123456789abcdef" * 4


@pytest.fixture
def manifest() -> dict[str, Any]:
    return {
        "format": 1,
        "name": "debian",
        "key": "0123456789abcdef01234567",
        "suite": "trixie",
        "arch": "amd64",
        "agent": {"version": "0.1.0"},
        "kernel": {"file": "vmlinuz", "release": "6.12.41-cloud-amd64", "sha256": SHA, "modules": []},
        "packages": [
            {"type": "deb", "name": "libstdc++6", "version": "14.2.0-19", "sha256": SHA},
            {"type": "deb", "name": "libstdc--6", "version": "14.2.0-19", "sha256": SHA},
            {"type": "deb", "name": "base", "version": "1:2.0+b1~rc1", "sha256": SHA},
            {"type": "wheel", "name": "typing_extensions", "version": "4.14.1", "sha256": SHA},
        ],
    }


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {package["name"]: package for package in document["packages"]}


def test_everything_of_the_manifest_is_there(manifest: dict[str, Any]) -> None:
    document = sbom.document(manifest)
    assert document["spdxVersion"] == "SPDX-2.3"
    assert document["dataLicense"] == "CC0-1.0"
    packages = by_name(document)
    assert set(packages) == {
        "debian-trixie-amd64", "linux", "caisson-agent", "libstdc++6", "libstdc--6", "base", "typing_extensions",
    }  # fmt: skip
    library = packages["libstdc++6"]
    assert library["versionInfo"] == "14.2.0-19"
    assert library["checksums"] == [{"algorithm": "SHA256", "checksumValue": SHA}]
    assert packages["linux"]["checksums"] == [{"algorithm": "SHA256", "checksumValue": SHA}]
    assert packages["caisson-agent"]["versionInfo"] == "0.1.0"


def test_packages_have_urls(manifest: dict[str, Any]) -> None:
    packages = by_name(sbom.document(manifest))

    def url(name: str) -> str:
        (reference,) = packages[name]["externalRefs"]
        assert (reference["referenceCategory"], reference["referenceType"]) == ("PACKAGE-MANAGER", "purl")
        return str(reference["referenceLocator"])

    assert url("libstdc++6") == "pkg:deb/debian/libstdc%2B%2B6@14.2.0-19?arch=amd64&distro=trixie"
    assert url("base") == "pkg:deb/debian/base@1%3A2.0%2Bb1~rc1?arch=amd64&distro=trixie"
    assert url("typing_extensions") == "pkg:pypi/typing-extensions@4.14.1"


def test_identifiers_are_unique_and_of_the_right_letters(manifest: dict[str, Any]) -> None:
    manifest["packages"].append(manifest["packages"][0])  # the same package again does not add one
    document = sbom.document(manifest)
    identifiers = [package["SPDXID"] for package in document["packages"]]
    assert len(set(identifiers)) == len(identifiers) == 7
    assert all(re.fullmatch(r"SPDXRef-[A-Za-z0-9.-]+", identifier) for identifier in identifiers)


def test_the_document_describes_the_image_which_contains_the_rest(manifest: dict[str, Any]) -> None:
    document = sbom.document(manifest)
    image, *rest = (package["SPDXID"] for package in document["packages"])
    relations = {
        (relation["spdxElementId"], relation["relationshipType"], relation["relatedSpdxElement"])
        for relation in document["relationships"]
    }
    assert relations == {
        ("SPDXRef-DOCUMENT", "DESCRIBES", image),
        *((image, "CONTAINS", identifier) for identifier in rest),
    }


def test_the_same_manifest_gives_the_same_bytes_and_another_one_another_namespace(
    tmp_path: Path, manifest: dict[str, Any]
) -> None:
    sbom.write(manifest, tmp_path / "first")
    shuffled = dict(reversed(manifest.items())) | {"packages": manifest["packages"][::-1]}
    first = (tmp_path / "first").read_text()
    sbom.write(dict(reversed(manifest.items())), tmp_path / "second")
    assert (tmp_path / "second").read_text() == first
    assert json.loads(first)["packages"] == sbom.document(shuffled)["packages"]
    manifest["packages"][0]["version"] = "15"
    assert sbom.document(manifest)["documentNamespace"] != json.loads(first)["documentNamespace"]


def test_created_is_a_date_that_was_given(manifest: dict[str, Any]) -> None:
    assert sbom.document(manifest)["creationInfo"]["created"] == "1970-01-01T00:00:00Z"
    assert sbom.document(manifest, created=1_700_000_000)["creationInfo"]["created"] == "2023-11-14T22:13:20Z"

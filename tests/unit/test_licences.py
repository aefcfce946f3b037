"""Test machine-readable licences of packages, as SPDX expressions, and the bill of materials with them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spdx_tools.spdx.parser.jsonlikedict.json_like_dict_parser import JsonLikeDictParser
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from caisson.image.build import sbom
from caisson.image.packages.contents import expression, files, licence, of_copyright
from caisson.image.packages.package import Package

SHA = "0123456789abcdef" * 4

COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: busybox

Files: *
Copyright: somebody
License: GPL-2

Files: libbb/*
 archival/*
Copyright: others
License: GPL-2+ or Expat

Files: debian/*
Copyright: more
License: BSD-3-clause
 Redistribution and use in source and binary forms, with or without
 .
 modification

License: GPL-2
 On Debian systems, the text is in /usr/share/common-licenses.
"""


@pytest.mark.parametrize(
    ("synopsis", "wanted"),
    [
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-2+", "GPL-2.0-or-later"),
        ("LGPL-2.1+", "LGPL-2.1-or-later"),
        ("AGPL-3.0-or-later", "AGPL-3.0-or-later"),
        ("Expat", "MIT"),
        ("GPL-3+ or Artistic", "GPL-3.0-or-later OR Artistic-1.0-Perl"),
        ("GPL-2+ and Zlib", "GPL-2.0-or-later AND Zlib"),
        ("GPL-2 or Expat, and BSD-3-clause", "(GPL-2.0-only OR MIT) AND BSD-3-Clause"),
        ("GPL-2+ with OpenSSL exception", "LicenseRef-GPL-2-or-later-with-OpenSSL-exception"),
        ("public-domain", "LicenseRef-public-domain"),
    ],
)
def test_names_of_debian_become_those_of_spdx(synopsis: str, wanted: str) -> None:
    assert expression(synopsis) == wanted


def test_a_copyright_file_is_all_its_licences() -> None:
    assert of_copyright(COPYRIGHT) == "BSD-3-Clause AND GPL-2.0-only AND (GPL-2.0-or-later OR MIT)"
    both = COPYRIGHT + "\nFiles: x\nLicense: BSD-3-clause and Zlib, and GPL-2+ or Expat\n"
    assert of_copyright(both) == "BSD-3-Clause AND GPL-2.0-only AND (GPL-2.0-or-later OR MIT) AND Zlib"
    assert of_copyright("This package was debianized by hand.\nLicense: GPL\n") == ""
    assert of_copyright(COPYRIGHT.partition("\n\n")[0]) == ""


def wheel(place: Path, metadata: str) -> Package:
    file = place / "it-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("it/__init__.py", "")
        archive.writestr("it-1.dist-info/METADATA", metadata)
    return Package.of("wheel", "it", "1", file)


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ("Name: it\nLicense-Expression: Apache-2.0 OR MIT\n", "Apache-2.0 OR MIT"),
        ("Name: it\nLicense: 3-Clause BSD License\n", "BSD-3-Clause"),
        ("Name: it\nLicense: MIT\n", "MIT"),
        ("Name: it\n", ""),
    ],
)
def test_wheels_declare_theirs(tmp_path: Path, metadata: str, wanted: str) -> None:
    package = wheel(tmp_path, metadata)
    assert licence(package) == wanted
    assert files(package) == ["it/__init__.py", "it-1.dist-info/METADATA"]


def document(*licences: str) -> dict[str, Any]:
    packages = [
        {"type": "deb", "name": f"p{number}", "version": "1", "sha256": SHA} | ({"license": one} if one else {})
        for number, one in enumerate(licences)
    ]
    manifest = {
        "name": "debian", "key": "0" * 24, "suite": "trixie", "arch": "amd64", "agent": {"version": "0.2.0"},
        "kernel": {"release": "6.12", "sha256": SHA}, "packages": packages,
    }  # fmt: skip
    return sbom.document(manifest)


def complaints(found: dict[str, Any]) -> list[str]:
    """Return the reference implementation's complaints about a document."""
    parsed = JsonLikeDictParser().parse(  # type: ignore[no-untyped-call]
        json.loads(json.dumps(found))
    )
    return [message.validation_message for message in validate_full_spdx_document(parsed)]


def test_the_reference_tool_finds_the_document_valid() -> None:
    found = document(of_copyright(COPYRIGHT), "", expression("GPL-2+ with OpenSSL exception"), "Apache-2.0 OR MIT")
    assert complaints(found) == []
    declared = {package["name"]: package["licenseDeclared"] for package in found["packages"]}
    assert declared["p0"] == "BSD-3-Clause AND GPL-2.0-only AND (GPL-2.0-or-later OR MIT)"
    assert declared["p1"] == "NOASSERTION"
    assert declared["linux"] == "GPL-2.0-only WITH Linux-syscall-note"
    assert found["hasExtractedLicensingInfos"][0]["licenseId"] == "LicenseRef-GPL-2-or-later-with-OpenSSL-exception"


def test_the_reference_tool_does_find_mistakes() -> None:
    assert complaints(document("Debians-own"))


NAMES = st.one_of(
    st.sampled_from(["GPL-2", "GPL-2+", "Expat", "BSD-3-clause", "public-domain", "Artistic", "LGPL-2.1+"]),
    st.text("abcXYZ0123456789.+-~ ()/", min_size=1, max_size=20).filter(lambda text: text.strip()),
)


@given(st.lists(st.tuples(NAMES, st.sampled_from([" or ", " and ", ", and ", ", or "])), min_size=1, max_size=4))
def test_whatever_a_file_says_the_document_stays_valid(parts: list[tuple[str, str]]) -> None:
    synopsis = "".join(name + operator for name, operator in parts[:-1]) + parts[-1][0]
    found = document(of_copyright(f"Format: https://x/copyright-format/1.0/\n\nFiles: *\nLicense: {synopsis}\n"))
    assert complaints(found) == []

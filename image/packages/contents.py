"""List a package's files and licences.

Licences are those that a package declares in machine-readable form: Debian's copyright files (DEP-5), a wheel's
METADATA (PEP 639), an apk's .PKGINFO.  They become expressions of the SPDX specification 2.3, annex D; a name that is
not on SPDX's list becomes a LicenseRef.
"""

from __future__ import annotations

import email
import io
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator

from caisson.image.packages.package import Package
from caisson.image.run import run

#: Bytes of a copyright file that are read: linux' has 60,000.
MAX_COPYRIGHT = 4 << 20

#: The Format field of a machine-readable copyright file, in every spelling that is in use.
MACHINE_READABLE = re.compile(r"^Format(-Specification)?:\s*\S*(copyright-format|dep5|DEP-5)", re.MULTILINE)

#: Debian's short names that SPDX has under another name; versions of GNU licences follow a rule (_spdx).
SHORT_NAMES = {
    "0bsd": "0BSD", "afl-2.1": "AFL-2.1", "apache-2": "Apache-2.0", "apache-2.0": "Apache-2.0",
    "artistic": "Artistic-1.0-Perl", "artistic-2.0": "Artistic-2.0", "boost-1.0": "BSL-1.0", "bsl-1.0": "BSL-1.0",
    "bsd-2-clause": "BSD-2-Clause", "bsd-3-clause": "BSD-3-Clause", "bsd-4-clause": "BSD-4-Clause",
    "bzip2-1.0.6": "bzip2-1.0.6", "cc-by-4.0": "CC-BY-4.0", "cc-by-sa-3.0": "CC-BY-SA-3.0", "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0", "curl": "curl", "expat": "MIT", "fsful": "FSFUL", "fsfullr": "FSFULLR",
    "isc": "ISC", "mit": "MIT", "mpl-1.1": "MPL-1.1", "mpl-2.0": "MPL-2.0", "openssl": "OpenSSL", "psf-2": "PSF-2.0",
    "psf-2.0": "PSF-2.0", "unicode-dfs-2016": "Unicode-DFS-2016", "unlicense": "Unlicense", "x11": "X11",
    "zlib": "Zlib",
}  # fmt: skip

#: GNU licences: name, version, and "+" for later ones.
GNU = re.compile(r"(a?gpl|lgpl|gfdl)-?v?([0-9](?:\.[0-9])?)(?:\.0)?(\+|-only|-or-later)?", re.IGNORECASE)

#: SPDX's own name for a licence that is not on its list.
REFERENCE = "LicenseRef-"


def files(package: Package) -> list[str]:
    """Return the regular files and hard links of a package, by their paths in the guest without the first slash.

    A wheel's are relative to where wheels are unpacked.
    """
    if package.kind == "wheel":
        with zipfile.ZipFile(package.file) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]
    return [member.name.removeprefix("./") for member in _members(package) if member.isfile() or member.islnk()]


def licence(package: Package) -> str:
    """Return the SPDX expression of what a package declares; empty if it declares nothing machine-readable."""
    if package.kind == "wheel":
        return _of_wheel(package)
    if package.kind == "apk":
        return _of_apk(package)
    place = f"usr/share/doc/{package.name}/copyright"
    with _archive(package) as archive:
        for member in archive:
            if member.name.removeprefix("./") == place and member.isfile():
                stream = archive.extractfile(member)
                return of_copyright(stream.read(MAX_COPYRIGHT).decode(errors="replace")) if stream else ""
    return ""


def of_copyright(text: str) -> str:
    """Return the SPDX expression of a Debian copyright file: all its licences; empty if it is not machine-readable.

    Source: copyright-format 1.0, "License field" and "Files paragraph".
    """
    if not MACHINE_READABLE.search(text[:4096]):
        return ""
    found = set()
    for paragraph in re.split(r"\n[ \t]*\n", text):
        field = re.search(r"^License:[ \t]*(\S.*)$", paragraph, re.MULTILINE)
        if field and re.search(r"^Files:", paragraph, re.MULTILINE):
            found |= set(_terms(expression(field[1])))
    found.discard("")
    return " AND ".join(f"({one})" if " OR " in one and len(found) > 1 else one for one in sorted(found))


def _terms(one: str) -> list[str]:
    """Return what an expression joins by AND, without the parentheses around alternatives."""
    if " OR " in re.sub(r"\([^)]*\)", "", one):
        return [one]
    return [term.removeprefix("(").removesuffix(")") for term in re.split(r" AND (?![^(]*\))", one)]


def expression(synopsis: str) -> str:
    """Return the SPDX expression of a License field's first line: names with "and", "or", "with … exception"."""
    # A comma before "or" and "and" binds less: A or B, and C.
    parts = [part for part in synopsis.split(",") if part.strip()]
    if len(parts) > 1:
        operator = " OR " if re.match(r"\s*or\b", parts[1]) else " AND "
        inner = [expression(re.sub(r"^\s*(?:and|or)\s+", "", part)) for part in parts]
        return operator.join(f"({one})" if " OR " in one and operator == " AND " else one for one in inner if one)
    words = re.split(r"\s+(and|or)\s+", synopsis.strip(), flags=re.IGNORECASE)
    return " ".join(word.upper() if number % 2 else _spdx(word) for number, word in enumerate(words))


def _spdx(name: str) -> str:
    """Return SPDX's name for a licence by Debian's name."""
    name = name.strip()
    if gnu := GNU.fullmatch(name):
        kind, version = gnu[1].upper(), gnu[2] if "." in gnu[2] else f"{gnu[2]}.0"
        if kind == "GFDL":
            version = "1.1" if version == "1.0" else version
        return f"{kind}-{version}-{'or-later' if gnu[3] in ('+', '-or-later') else 'only'}"
    if known := SHORT_NAMES.get(name.lower()):
        return known
    return REFERENCE + (re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("+", "-or-later")).strip("-") or "unnamed")


def _of_wheel(package: Package) -> str:
    with zipfile.ZipFile(package.file) as archive:
        metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), "")
        if not metadata:
            return ""
        fields = email.message_from_bytes(archive.read(metadata))
    if declared := fields.get("License-Expression"):
        return str(declared)
    name = str(fields.get("License") or "").strip()
    if "\n" in name or len(name) > 60 or not name:
        return ""
    return _spdx(re.sub(r"^(?:3-Clause BSD|BSD 3-Clause)(?: License)?$", "BSD-3-clause", name))


def _of_apk(package: Package) -> str:
    with _archive(package) as archive:
        for member in archive:
            if member.name == ".PKGINFO":
                stream = archive.extractfile(member)
                text = stream.read(MAX_COPYRIGHT).decode(errors="replace") if stream else ""
                found = re.search(r"^license = (.+)$", text, re.MULTILINE)
                return found[1].strip() if found and _is_expression(found[1]) else ""
    return ""


def _is_expression(text: str) -> bool:
    words = re.sub(r"[()]", " ", text).split()
    return bool(words) and all(re.fullmatch(r"[A-Za-z0-9.+-]+", word) for word in words) and len(words) % 2 == 1


def references(expressions: Iterable[str]) -> list[str]:
    """Return the names in expressions that are not on SPDX's list, sorted."""
    return sorted({name for one in expressions for name in re.findall(r"LicenseRef-[A-Za-z0-9.-]+", one)})


def _members(package: Package) -> Iterator[tarfile.TarInfo]:
    with _archive(package) as archive:
        yield from archive


def _archive(package: Package) -> tarfile.TarFile:
    if package.kind == "apk":
        return tarfile.open(package.file, "r:gz", ignore_zeros=True)
    return tarfile.open(fileobj=io.BytesIO(run(["dpkg-deb", "--fsys-tarfile", package.file])))

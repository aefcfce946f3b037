"""Keep only the shared libraries that something in the guest needs (by the dynamic sections, readelf(1)), stripped."""

from __future__ import annotations

import fnmatch
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from caisson.image.build.definition import Definition
from caisson.image.run import run

#: An entry of a dynamic section, in ELF64: a tag and a value (elf(5)).
ENTRY_SIZE = struct.calcsize("QQ")


def is_elf(file: Path) -> bool:
    """Return whether a file is an ELF object (a program or a library)."""
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def drop_unused_libraries(tree: Path, definition: Definition) -> None:
    """Remove shared libraries that no program, extension module or kept library names as needed.

    The dynamic section lists them (readelf -d), except for what is loaded by name at run time: the definition keeps
    those.
    """
    place = tree / definition.libraries
    needed: set[str] = set()
    elves = [file for file in tree.rglob("*") if is_elf(file)]
    needed_by = {file: needs(file) for file in elves}
    todo = [file for file in elves if file.parent != place]
    for file in place.iterdir():
        if any(fnmatch.fnmatch(str(file.relative_to(tree)), kept) for kept in definition.keep):
            needed.add(file.name)
            todo.append(file.resolve())
    while todo:
        for name in needed_by[todo.pop()]:
            if name not in needed:
                needed.add(name)
                target = (place / name).resolve()
                if target in needed_by:
                    todo.append(target)
    used = {(place / name).resolve() for name in needed}
    for file in list(place.iterdir()):
        if file.is_dir() and not file.is_symlink():
            continue
        # The loader looks for the name in the dynamic section: keep the file behind that link, drop other links.
        if (file.name not in needed and file.resolve() not in used) or (file.is_symlink() and file.name not in needed):
            file.unlink()


def needs(file: Path) -> set[str]:
    """Return the names of the libraries, and of the program loader, that an object needs."""
    output = run(["readelf", "--dynamic", "--program-headers", "--wide", file]).decode(errors="replace")
    names = {line.rsplit("[", 1)[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line}
    names |= {
        line.rsplit("/", 1)[1].rstrip("]").strip() for line in output.splitlines() if "program interpreter:" in line
    }
    return names


def drop_unused_needs(files: Iterable[Path], place: Path) -> None:
    """Remove from each object's dynamic section the libraries of which it uses no symbol, as by ld --as-needed.

    The guest then neither holds nor relocates them.  ``place`` has the libraries.  One that is not there is kept, and
    so is one of which the object needs a version: ld.so fails if the library of a needed version is not loaded.
    """
    for file in files:
        used = _symbols(file, defined=False)
        versioned = _versioned(file)
        section, entries = _dynamic(file)
        unused = [
            number
            for number, entry in enumerate(entries)
            if (name := _needed(entry)) not in versioned
            and (place / name).is_file()
            and not used & _symbols(place / name, defined=True)
        ]
        with file.open("r+b") as stream:
            stream.seek(section)
            raw = stream.read(len(entries) * ENTRY_SIZE)
            cut = [raw[at : at + ENTRY_SIZE] for at in range(0, len(raw), ENTRY_SIZE)]
            kept = b"".join(entry for number, entry in enumerate(cut) if number not in unused)
            stream.seek(section)
            stream.write(kept.ljust(len(raw), b"\0"))  # DT_NULL ends the section


def _dynamic(file: Path) -> tuple[int, list[str]]:
    """Return where the dynamic section begins in a file, and readelf's line for each of its entries."""
    lines = run(["readelf", "--dynamic", "--wide", file]).decode(errors="replace").splitlines()
    start = re.search(r"offset (0x[0-9a-f]+)", "\n".join(lines))
    return (int(start[1], 16) if start else 0), [line for line in lines if line.startswith(" 0x")]


def _versioned(file: Path) -> set[str]:
    """Return the libraries of which an object needs a version (readelf(1), --version-info)."""
    lines = run(["readelf", "--version-info", "--wide", file]).decode(errors="replace")
    return set(re.findall(r" File: (\S+)", lines))


def _needed(entry: str) -> str:
    return entry.rsplit("[", 1)[1].rstrip("]") if "(NEEDED)" in entry else ""


def _symbols(file: Path, *, defined: bool) -> set[str]:
    """Return the dynamic symbols that an object defines, or those that it takes from others; without their versions."""
    found = set()
    for line in run(["readelf", "--dyn-syms", "--wide", file]).decode(errors="replace").splitlines():
        words = line.split()
        if len(words) >= 8 and words[0].rstrip(":").isdecimal() and (words[6] != "UND") == defined:
            found.add(words[7].partition("@")[0])
    return found


def strip(tree: Path, definition: Definition) -> None:
    """Remove symbols that nothing at run time reads."""
    program = f"{definition.triplet}-strip" if definition.is_foreign else "strip"
    files = [file for file in tree.rglob("*") if is_elf(file)]
    for file in files:
        file.chmod(file.stat().st_mode | 0o200)
    if files:
        run([program, "--strip-unneeded", "--preserve-dates", *files])

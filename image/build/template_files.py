"""Additions of a definition and its templates to a guest: their own files, and hooks that change the tree."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from caisson.image.build import manifest
from caisson.image.build.cache import digest_of_files
from caisson.image.build.definition import Loaded, rendered
from caisson.image.errors import ImageError
from caisson.image.formats.scan import merge_directories
from caisson.image.run import run


class TemplateFiles:
    """The files and hooks of a definition.  Raises ImageError for a hook that is not executable, or a bad template."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.hooks = [loaded.beside(name) for name in loaded.definition.hooks]
        for hook in self.hooks:
            if not os.access(hook, os.X_OK):
                raise ImageError(f"{hook}: is a hook and not executable; run: chmod +x {shlex.quote(str(hook))}")
        for _, source in self.sources():
            if _is_template(source):
                self._rendered(source)

    def sources(self) -> list[tuple[str, Path]]:
        """Return (path in the guest, file) of each file, link and empty directory; the last template to name a path
        wins.  Raises ImageError, OSError.
        """
        found = {}
        for template in self._loaded.templates:
            top = template / "files"
            for place, names, files in os.walk(top, onerror=_raise if top.is_dir() else None):
                for entry in (Path(place, name) for name in (*names, *files)):
                    name = str(entry.relative_to(top))
                    if entry.is_symlink() or (entry.is_dir() and not any(entry.iterdir())):
                        found[name] = entry
                    elif entry.is_file():
                        found[name.removesuffix(".j2")] = entry
                    elif not entry.is_dir():
                        raise ImageError(f"{entry}: is not a file, a directory or a link; remove it")
        for name, beside in self._loaded.definition.files.items():
            found[os.path.normpath(name.lstrip("/"))] = file = self._loaded.beside(beside).resolve()
            if not file.is_file():
                raise ImageError(f"files: {file}: is not a file")
        return sorted(found.items())

    def digests(self) -> list[list[str]]:
        """Return the files with their digests, for the key of an image.  Raises ImageError, OSError."""
        return [[name, _digest(source)] for name, source in self.sources()]

    def render(self, layer: Path) -> None:
        """Write the files: *.j2 are rendered with the definition, links stay links, others are copied.

        Raises ImageError.
        """
        for name, source in self.sources():
            place = layer / name
            for above in Path(name).parents:
                if (layer / above).is_symlink() or (layer / above).is_file():  # of another template
                    raise ImageError(f"{source}: cannot be at /{name} in the guest, where /{above} is no directory")
            place.parent.mkdir(parents=True, exist_ok=True)
            if _is_directory(source):
                place.mkdir(exist_ok=True)
                continue
            if _is_directory(place):
                raise ImageError(f"{source}: cannot be at /{name} in the guest, which is a directory")
            if source.is_symlink():
                place.symlink_to(source.readlink())
                continue
            if _is_template(source):
                place.write_text(self._rendered(source), encoding="utf-8")
            else:
                shutil.copyfile(source, place)
            with place.open("rb") as start:
                script = start.read(2) == b"#!"
            place.chmod(0o755 if script or os.access(source, os.X_OK) else 0o644)

    def _rendered(self, source: Path) -> str:
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        return rendered(source, manifest.plain(self._loaded.definition), environment)

    def run_hooks(self, trees: Sequence[Path], whole: Path, report: Callable[[str], None]) -> Path:
        """Copy all layers into one tree and run the hooks on it.  Raises ImageError if a hook fails."""
        whole.mkdir()
        with merge_directories(trees, {}) as tree:
            for name, node in tree.files():  # nothing in it is below a link: no file is written outside
                place = whole / os.fsdecode(name)
                if node.is_directory:
                    place.mkdir()
                elif node.is_file:
                    shutil.copyfile(os.fsdecode(node.file), place)
                else:
                    place.symlink_to(os.fsdecode(node.target))
                    continue
                place.chmod(node.mode & 0o7777)
        for hook in self.hooks:
            report(f"running {hook.name}")
            run([hook, whole], cwd=hook.parent)
        return whole


def _raise(error: OSError) -> None:
    raise error


def _is_template(source: Path) -> bool:
    return source.suffix == ".j2" and source.is_file() and not source.is_symlink()


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _digest(source: Path) -> str:
    if source.is_symlink():
        return f"link to {source.readlink()}"
    return "directory" if source.is_dir() else digest_of_files(source.parent, [source])

"""Additions of a definition and its templates to a guest: their own files, and hooks that change the tree."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2

from caisson.image.build import manifest
from caisson.image.build.definition import Loaded
from caisson.image.errors import ImageError
from caisson.image.run import run


class TemplateFiles:
    """The files and hooks of a definition.  Raises ImageError for a hook that is not executable."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.hooks = [loaded.beside(name) for name in loaded.definition.hooks]
        for hook in self.hooks:
            if not os.access(hook, os.X_OK):
                raise ImageError(f"{hook}: is a hook and not executable; run: chmod +x {shlex.quote(str(hook))}")

    def sources(self) -> list[tuple[str, Path]]:
        """Return (path in the guest, file) of each; the last template to name a path wins."""
        found = {}
        for template in self._loaded.templates:
            for file in sorted((template / "files").rglob("*")):
                if file.is_file():
                    found[str(file.relative_to(template / "files")).removesuffix(".j2")] = file
        own = self._loaded.definition.files
        found |= {name.lstrip("/"): self._loaded.beside(file) for name, file in own.items()}
        return sorted(found.items())

    def render(self, layer: Path) -> None:
        """Write the files: *.j2 are rendered with the definition, others are copied."""
        values = manifest.plain(self._loaded.definition)
        for name, source in self.sources():
            place = layer / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".j2":
                text = jinja2.Template(source.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
                place.write_text(text.render(values))
            else:
                shutil.copyfile(source, place)
            with place.open("rb") as start:
                script = start.read(2) == b"#!"
            place.chmod(0o755 if script or os.access(source, os.X_OK) else 0o644)

    def run_hooks(self, trees: Iterable[Path], whole: Path, report: Callable[[str], None]) -> Path:
        """Copy all layers into one tree and run the hooks on it.  Raises ImageError if a hook fails."""
        for tree in trees:
            shutil.copytree(tree, whole, symlinks=True, dirs_exist_ok=True)
        for hook in self.hooks:
            report(f"running {hook.name}")
            run([hook, whole], cwd=hook.parent)
        return whole

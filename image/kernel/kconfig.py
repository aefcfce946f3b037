"""Explain why a kernel's configuration did not accept a request, by evaluating its Kconfig files with kconfiglib.

Source: Documentation/kbuild/kconfig-language.rst.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kconfiglib

from caisson.image.errors import ImageError

#: How deep a chain of unmet dependencies is followed.
DEPTH = 4


class Kconfig(kconfiglib.Kconfig):  # type: ignore[misc]  # kconfiglib is untyped
    """Teach kconfiglib what has changed in the language since: `option modules` is `modules` since Linux 5.14."""

    def _open(self, filename: str, mode: str) -> Any:
        file = super()._open(filename, mode)
        if "r" not in mode:
            return file
        with file:
            return io.StringIO(re.sub(r"^\s*modules$", "\toption modules", file.read(), flags=re.MULTILINE))


class Explainer:
    """Represent a kernel tree's Kconfig with the resulting configuration."""

    def __init__(self, tree: Path, arch: str, version: str, config: Path) -> None:
        """``arch`` is the kernel's name of the architecture.  Raises ImageError for files that cannot be read."""
        with _environment({"srctree": str(tree), "ARCH": arch, "SRCARCH": arch, "KERNELVERSION": version}, tree):
            try:
                self._kconfig = Kconfig(str(tree / "Kconfig"), warn=False)
                self._kconfig.load_config(str(config))
            except (kconfiglib.KconfigError, OSError) as error:
                raise ImageError(f"the Kconfig files of {tree} cannot be read: {error}") from error

    def why(self, symbol: str, wanted: str) -> str:
        """Explain why CONFIG_… ``symbol`` is not what was ``wanted``, in words that follow "it is …, "."""
        name = symbol.removeprefix("CONFIG_")
        found = self._kconfig.syms.get(name)
        if found is None or not found.nodes:
            near = difflib.get_close_matches(name, (one.name for one in self._kconfig.unique_defined_syms), 1, 0.8)
            hint = f"; did you mean CONFIG_{near[0]}?" if near else "; it may have been removed, or renamed"
            return "because this kernel has no such symbol" + hint
        if wanted == "n":
            return self._why_on(found)
        if wanted == "m" and found.orig_type != kconfiglib.TRISTATE:
            return "because it is no tristate: it can be built in only"
        if wanted == "m" and self._kconfig.modules.tri_value == 0:
            return "because m needs CONFIG_MODULES, which is n"
        return self._why_off(found)

    def _why_on(self, symbol: Any) -> str:
        """Explain why a symbol is on that should be off."""
        selectors = [_name(part) for part in _operands(symbol.rev_dep, kconfiglib.OR) if kconfiglib.expr_value(part)]
        if selectors:
            return f"because {', '.join(selectors)} selects it"
        if not _has_prompt(symbol):
            return "because it has no prompt: the kernel decides it by itself"
        return f"although it could be off ({_where(symbol)})"

    def _why_off(self, symbol: Any) -> str:
        """Explain why a symbol is off, or has another value."""
        unmet = list(_unmet(symbol.direct_dep, DEPTH))
        if unmet:
            return f"because it needs {'; '.join(unmet)}"
        if symbol.choice is not None and symbol.choice.selection is not symbol:
            chosen = symbol.choice.selection
            return f"because of its choice {_name(chosen)} was taken" if chosen is not None else "because of its choice"
        hidden = [] if not _has_prompt(symbol) else list(_hidden(symbol))
        if hidden:
            return f"because it is hidden without {'; '.join(hidden)}"
        if not _has_prompt(symbol):
            return f"because it has no prompt{_selected_by(symbol)}"
        return f"although nothing is unmet ({_where(symbol)})"


def _selected_by(symbol: Any) -> str:
    names = [_name(part).partition(" && ")[0] for part in _operands(symbol.rev_dep, kconfiglib.OR)]
    names = [name for name in names if name != "n"]
    if not names:
        return ": the kernel decides it by itself"
    return f": it comes with {' or '.join(names[:5])}" + (" and others" if len(names) > 5 else "")


def _hidden(symbol: Any) -> Iterator[str]:
    for node in symbol.nodes:
        if node.prompt:
            yield from _unmet(node.prompt[1], DEPTH)


def _unmet(expression: Any, depth: int) -> Iterator[str]:
    """Yield the parts of a dependency that are not met, each with what it needs in turn."""
    for part in _operands(expression, kconfiglib.AND):
        if kconfiglib.expr_value(part):
            continue
        if isinstance(part, kconfiglib.Choice):
            yield from _unmet(part.direct_dep, depth)  # a choice has no name
            continue
        text = _name(part)
        if isinstance(part, kconfiglib.Symbol):
            if not part.nodes:
                yield f"{text}, which this architecture does not have"
                continue
            text += f" ({_where(part)}), which is {part.str_value or 'not set'}"
            if depth and (deeper := list(_unmet(part.direct_dep, depth - 1))):
                text += f" and needs {'; '.join(deeper)}"
            elif not _has_prompt(part):
                text += f" and has no prompt{_selected_by(part)}"
        yield text


def _operands(expression: Any, operator: int) -> Iterator[Any]:
    """Yield the parts of a chain of one operator."""
    if isinstance(expression, tuple) and expression[0] == operator:
        yield from _operands(expression[1], operator)
        yield from _operands(expression[2], operator)
    else:
        yield expression


def _name(expression: Any) -> str:
    def spelled(item: Any) -> str:
        constant = item.is_constant if isinstance(item, kconfiglib.Symbol) else False
        return str(kconfiglib.standard_sc_expr_str(item)) if constant else f"CONFIG_{item.name}"

    return str(kconfiglib.expr_str(expression, spelled))


def _has_prompt(symbol: Any) -> bool:
    return any(node.prompt for node in symbol.nodes)


def _where(symbol: Any) -> str:
    node = symbol.nodes[0]
    return f"{node.filename}:{node.linenr}"


@contextmanager
def _environment(values: Mapping[str, str], tree: Path) -> Iterator[None]:
    """Return what the kernel's Makefile tells Kconfig; its files also call the compiler, by paths below the tree."""
    tools = {"CC": "gcc", "HOSTCC": "gcc", "LD": "ld", "AR": "ar", "NM": "nm", "OBJCOPY": "objcopy"}
    others = {"RUSTC": "rustc", "BINDGEN": "bindgen", "PAHOLE": "pahole", "CLANG_FLAGS": "", "CC_VERSION_TEXT": "gcc"}
    before, place = dict(os.environ), Path.cwd()
    os.environ.update({**tools, **others, **values})
    os.chdir(tree)
    try:
        yield
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)

"""Test settings that are declared once: accepted values, errors, and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.definition import Definition, find, load, schema
from caisson.image.build.settings import (
    DefinitionError,
    describe_settings,
    merge,
    override,
    parse_settings,
    section,
    setting,
)
from caisson.image.build.summary import describe


@dataclass(frozen=True)
class Inner:
    size: str = setting("how large", default="")
    many: tuple[str, ...] = setting("several", default=())


@dataclass(frozen=True)
class Outer:
    name: str = setting("what it is called")
    inner: Inner = section(Inner, "more")  # noqa: RUF009
    kind: str = setting("which", default="a", choices=("a", "b"))
    on: bool = setting("whether", default=False)


def test_a_mapping_becomes_an_object() -> None:
    made = parse_settings(Outer, {"name": "x", "inner": {"many": ["1", "2"]}, "kind": "b", "on": True}, "f")
    assert made == Outer("x", Inner(many=("1", "2")), "b", True)
    assert parse_settings(Outer, {"name": "x"}, "f") == Outer("x")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"name": "x", "inner": {"sise": "1"}}, r"f: inner\.sise is not a key .* did you mean inner\.size\?"),
        ({"name": "x", "inner": []}, "f: inner must be a mapping"),
        ({"name": "x", "kind": "c"}, "f: kind is one of a, b, not 'c'"),
        ({"name": "x", "on": "yes"}, "f: on must be true or false"),
        ({}, "f: name is missing"),
    ],
)
def test_setting_errors_name_the_setting(document: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        parse_settings(Outer, document, "f")


def test_laying_one_over_another() -> None:
    base = {"a": [1], "s": {"x": 1, "y": [1]}, "k": 1}
    over = {"a+": [2], "s": {"y+": [2], "z": 3}, "k": 2, "new+": [4]}
    assert merge(base, over) == {"a": [1, 2], "s": {"x": 1, "y": [1, 2], "z": 3}, "k": 2, "new": [4]}
    assert base == {"a": [1], "s": {"x": 1, "y": [1]}, "k": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=x", {"name": "x"}),
        ("on=true", {"on": True}),
        ("inner.size=24 MB", {"inner": {"size": "24 MB"}}),
        ("inner.many=[a, b]", {"inner": {"many": ["a", "b"]}}),
        ("inner.many+=c", {"inner": {"many+": ["c"]}}),
        ("name=", {"name": ""}),
    ],
)
def test_assignments(text: str, value: dict[str, Any]) -> None:
    assert override(text) == value


@pytest.mark.parametrize("text", ["name", "=x", "a b=c", "name=[", "inner..size=1"])
def test_set_rejects_malformed_assignments(text: str) -> None:
    with pytest.raises(DefinitionError, match="--set"):
        override(text)


def test_every_setting_has_its_help_and_its_place_in_the_schema() -> None:
    told = {one.key: one for one in describe_settings(Definition)}
    assert {"name", "kernel.source", "limits.image", "verity", "prune"} < set(told)
    assert all(one.help and not one.help.endswith(".") for one in told.values())
    lines = list(describe())
    assert [line.split()[0] for line in lines] == list(told)
    document = schema()
    assert document["properties"]["kernel"]["required"] == ["fragments"]
    assert document["properties"]["format"]["enum"][0] == "initrd"
    assert document["additionalProperties"] is False


def test_settings_win_over_the_file() -> None:
    loaded = load(settings=["compression=zstd", "packages+=strace", "limits.image=24 MB"])
    assert loaded.definition.compression == "zstd"
    assert loaded.definition.packages[-1] == "strace"
    assert loaded.definition.limits.bytes_of("image") == 24_000_000
    with pytest.raises(DefinitionError, match=r"compresion is not a key .* did you mean compression"):
        load(settings=["compresion=zstd"])


def test_a_template_of_ones_own_extends_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_text("extends: lean\nname: mine\npackages+: [strace]\nfiles: {/etc/motd: motd}\n")
    (tmp_path / "motd").write_text("hello\n")
    loaded = load(find(str(tmp_path)))
    assert loaded.definition.name == "mine"
    assert loaded.definition.packages[-1] == "strace"
    assert "hotplug" in loaded.definition.kernel.fragments
    assert [place.name for place in loaded.templates] == ["debian", "lean", tmp_path.name]
    assert loaded.beside("motd") == tmp_path / "motd"
    with pytest.raises(DefinitionError, match="none: is not in "):
        loaded.beside("none")


def test_a_template_that_extends_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(DefinitionError, match="extends itself"):
        load(tmp_path / "a.yaml")


def test_templates_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"template 'gentoo': does not exist; .*debian.*lean"):
        find("gentoo")
    (tmp_path / "image.yaml").write_text("extends: gentoo\n")
    with pytest.raises(DefinitionError, match="template 'gentoo': does not exist"):
        load(tmp_path / "image.yaml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["kernel.source=linux-source-6.12"], "either a package or a source"),
        (["kernel.package="], "either a package or a source"),
        (["verity=true"], "verity and layout need a disk; choose a format of erofs"),
        (["layout=gpt"], "verity and layout need a disk"),
        (["format=squashfs", "layout=dax"], "layout dax needs a format that can be mapped: erofs, ext4, not squashfs"),
        (["limits.image=24 potatoes"], "limits.image: '24 potatoes' is not a size"),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        load(settings=settings)

"""Test what a template adds to a guest: its files, and its hooks' tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caisson.image.build.definition import load
from caisson.image.build.rootfs import busybox_rootfs, prune
from caisson.image.build.template_files import TemplateFiles
from caisson.image.errors import ImageError


def template(place: Path, more: str = "", extends: str = "debian") -> Path:
    """Write a template; its files are still to come."""
    (place / "files").mkdir(parents=True)
    (place / "image.yaml").write_text(f"extends: {extends}\nname: mine\n{more}")
    return place


def files(place: Path) -> TemplateFiles:
    return TemplateFiles(load(place / "image.yaml"))


def test_links_empty_directories_and_odd_names_are_in_the_guest_as_they_are(tmp_path: Path) -> None:
    mine = template(tmp_path / "mine")
    (mine / "files/etc/empty").mkdir(parents=True)
    (mine / "files/etc/localtime").symlink_to("/etc/passwd")
    (mine / "files/etc/dangling").symlink_to("/nonexistent")
    (mine / "files/etc/directory").symlink_to("empty")
    (mine / "files" / os.fsdecode(b"\xff\n")).write_text("odd")
    layer = tmp_path / "layer"
    layer.mkdir()
    made = files(mine)
    made.render(layer)
    assert (layer / "etc/empty").is_dir() and (layer / os.fsdecode(b"\xff\n")).read_text() == "odd"
    targets = {path.name: str(path.readlink()) for path in (layer / "etc").iterdir() if path.is_symlink()}
    assert targets == {"localtime": "/etc/passwd", "dangling": "/nonexistent", "directory": "empty"}
    before = made.digests()
    (mine / "files/etc/dangling").unlink()
    (mine / "files/etc/dangling").symlink_to("/elsewhere")
    assert made.digests() != before


def test_nothing_is_written_below_a_link_of_another_template(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    template(tmp_path / "base")
    (tmp_path / "base/files/link").symlink_to(outside)
    mine = template(tmp_path / "mine", extends="../base")
    (mine / "files/link").mkdir()
    (mine / "files/link/file").write_text("x")
    (tmp_path / "layer").mkdir()
    with pytest.raises(ImageError, match=r"cannot be at /link/file in the guest, where /link is no directory"):
        files(mine).render(tmp_path / "layer")
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{{ nope }}", r"x\.j2: 'nope' is undefined"),
        (b"\n{% if %}", r"x\.j2:2: Expected an expression"),
        (b"{{ 1 / 0 }}", r"x\.j2: division by zero"),
        (b"\xff", r"x\.j2: is not UTF-8 at byte 0"),
    ],
)
def test_a_file_that_cannot_be_rendered_is_named_before_anything_is_made(
    tmp_path: Path, text: bytes, complaint: str
) -> None:
    mine = template(tmp_path / "mine")
    (mine / "files/x.j2").write_bytes(text)
    with pytest.raises(ImageError, match=complaint):
        files(mine)


def test_files_that_an_image_cannot_hold(tmp_path: Path) -> None:
    os.mkfifo(template(tmp_path / "one") / "files/fifo")
    with pytest.raises(ImageError, match=r"files/fifo: is not a file, a directory or a link"):
        files(tmp_path / "one")
    two = template(tmp_path / "two")
    (two / "files/usr").write_text("x")
    (tmp_path / "layer/usr").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"files/usr: cannot be at /usr in the guest, which is a directory"):
        files(two).render(tmp_path / "layer")


def test_the_tree_of_hooks_is_merged_in_the_guest_not_on_this_machine(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "certs").mkdir(parents=True)
    (outside / "zone").write_text("the host's")
    base, layer, whole = tmp_path / "base", tmp_path / "layer", tmp_path / "whole"
    (base / "usr/bin").mkdir(parents=True)
    (base / "bin").symlink_to("usr/bin")
    (base / "localtime").symlink_to(outside / "zone")
    (base / "certs").symlink_to(outside / "certs")
    (layer / "bin").mkdir(parents=True)
    (layer / "bin/hello").write_text("hi")
    (layer / "bin/hello").chmod(0o755)
    (layer / "localtime").write_text("the guest's")
    (layer / "certs").mkdir()
    (layer / "certs/mine").write_text("x")
    hook = tmp_path / "mine/hook"
    template(tmp_path / "mine", "hooks: [hook]\n")
    hook.write_text('#!/bin/sh\necho hooked >"$1/hooked"\n')
    hook.chmod(0o755)
    files(tmp_path / "mine").run_hooks([base, layer], whole, lambda _: None)
    assert (outside / "zone").read_text() == "the host's" and not list((outside / "certs").iterdir())
    assert (whole / "localtime").read_text() == "the guest's" and (whole / "certs/mine").read_text() == "x"
    assert (whole / "bin").is_symlink() and os.access(whole / "usr/bin/hello", os.X_OK)
    assert (whole / "hooked").read_text() == "hooked\n"


def test_pruning_removes_nothing_outside_the_tree(tmp_path: Path) -> None:
    outside = tmp_path / "etc"
    outside.mkdir()
    (outside / "certificate").write_text("the host's")
    tree = tmp_path / "tree"
    (tree / "share/certs").mkdir(parents=True)
    (tree / "share/certs/one").write_text("")
    (tree / "here").symlink_to("share/certs")
    (tree / "there").symlink_to(outside)
    prune(tree, ["there/*", "here/*", "*/certificate"], [])
    assert (outside / "certificate").exists() and not list((tree / "share/certs").iterdir())


def test_a_package_without_a_busybox_is_refused_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"busybox: the package in the definition has no bin/busybox"):
        busybox_rootfs(tmp_path, tmp_path / "target", tmp_path, tmp_path)

"""Test image documents with one or two odd values each: the result is an image or a one-line error.

Every odd value is put in every place of an index, a manifest and a configuration; every place is also left out, and
duplicated.  hypothesis nests indexes and repeats descriptors.  Digests are always correct, as a tool would write them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caisson.image.containers.documents import ContainerImage, read_directory, read_docker, read_layout
from caisson.image.errors import ImageError

ODD: list[Any] = [
    None, "", "x", "\0", "\ud800", "../..", "/", "é" * 300, "sha256:", "sha256:" + "A" * 64, "application/json",
    0, -1, 1 << 70, 1.5, True, [], [None], [7], ["x"], [["x"]], [{}], {}, {"a": 1}, {"": ""},
]  # fmt: skip

LAYER = "1" * 64
KIND = "application/vnd.oci.image.{}.v1+json"
CONFIG: dict[str, Any] = {
    "architecture": "amd64",
    "os": "linux",
    "created": "2026-01-01T00:00:00Z",
    "config": {
        "User": "1:2", "Env": ["A=1", "B"], "Entrypoint": ["/e"], "Cmd": ["c"], "WorkingDir": "/w/../x",
        "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}}, "Labels": {"a": "b"}, "StopSignal": "SIGTERM",
    },
    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{LAYER}"]},
    "history": [{"created_by": "x", "empty_layer": True}],
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": KIND.format("manifest"),
    "config": {"mediaType": KIND.format("config"), "digest": "", "size": 1},
    "layers": [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": f"sha256:{LAYER}", "size": 1,
         "urls": ["https://layers.example/1"], "annotations": {"a": "b"}}
    ],
    "annotations": {"a": "b"},
}  # fmt: skip
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": KIND.format("index"),
    "manifests": [
        {"mediaType": KIND.format("manifest"), "digest": "", "size": 1,
         "platform": {"architecture": "amd64", "os": "linux", "variant": "v1"},
         "annotations": {"org.opencontainers.image.ref.name": "one"}}
    ],
    "annotations": {"a": "b"},
}  # fmt: skip
WHOLE = [INDEX, MANIFEST, CONFIG]
SAVED: list[Any] = [{"Config": "config.json", "RepoTags": ["box:1"], "Layers": ["layer.tar"]}]

Place = tuple[str | int, ...]


class Files:
    """An image's files, in memory."""

    shown = "image"

    def __init__(self, **files: bytes) -> None:
        self.files = files

    def has(self, name: str) -> bool:
        return name in self.files

    def open(self, name: str) -> IO[bytes]:
        if name not in self.files:
            raise ImageError(f"{self.shown} lacks {name!r}")
        return io.BytesIO(self.files[name])

    def add(self, document: object, place: str = "blobs/sha256/{}") -> str:
        data = json.dumps(document).encode()
        digest = hashlib.sha256(data).hexdigest()
        self.files[place.format(digest)] = data
        return f"sha256:{digest}"


def layout(index: Any, manifest: Any, config: Any) -> Files:
    """Return a layout with these documents; descriptors get their digests if they have a field for one."""
    files = Files(**{f"blobs/sha256/{LAYER}": b""})
    digest = files.add(config)
    with contextlib.suppress(KeyError, TypeError, IndexError):
        if manifest["config"]["digest"] == "":
            manifest = {**manifest, "config": {**manifest["config"], "digest": digest}}
    digest = files.add(manifest)
    with contextlib.suppress(KeyError, TypeError, IndexError):
        if index["manifests"][0]["digest"] == "":
            index = {**index, "manifests": [{**index["manifests"][0], "digest": digest}, *index["manifests"][1:]]}
    files.files["index.json"] = json.dumps(index).encode()
    return files


def directory(index: Any, manifest: Any, config: Any) -> Files:
    """Return the same documents as skopeo's `dir:`."""
    files = Files(**{LAYER: b""})
    digest = files.add(config, "{}")
    with contextlib.suppress(KeyError, TypeError, IndexError):
        if manifest["config"]["digest"] == "":
            manifest = {**manifest, "config": {**manifest["config"], "digest": digest}}
    files.files["manifest.json"] = json.dumps(manifest).encode()
    return files


def of_layout(files: Files, tag: str = "") -> ContainerImage:
    return read_layout(files, "amd64", tag)


def of_directory(files: Files) -> ContainerImage:
    return read_directory(files, "amd64")


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def changed(document: Any, place: Place, change: Callable[[Any, Any], None]) -> Any:
    """Return a copy of a document with ``change`` applied in one place; it gets the parent and the key there."""
    if not place:
        holder = [copy.deepcopy(document)]
        change(holder, 0)
        return holder[0] if holder else None
    made = copy.deepcopy(document)
    at = made
    for key in place[:-1]:
        at = at[key]
    change(at, place[-1])
    return made


def replaced(value: Any, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(value)


def variants(document: Any) -> Iterator[Any]:
    """Yield a document with every odd value in every place, without each place, and with list elements duplicated."""

    def left_out(holder: Any, key: Any) -> None:
        del holder[key]

    def twice(holder: Any, key: Any) -> None:
        if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))

    for place in places(document):
        for odd in ODD:
            yield changed(document, place, partial(replaced, odd))
        yield changed(document, place, left_out)
        yield changed(document, place, twice)


def outcome(read: Callable[[], ContainerImage]) -> ContainerImage | None:
    """Return the image, having checked everything that reaches a guest; None after a one-line error."""
    try:
        image = read()
    except ImageError as error:
        text = str(error)
        assert text
        assert len(text) < 1000
        return None
    config = image.config
    for text in (*config.entrypoint, *config.command, *config.env, config.user, config.workdir, *config.volumes):
        assert isinstance(text, str)
        assert "\0" not in text
        text.encode()
    assert config.words(())
    for path in (config.workdir, *config.volumes):
        assert path.startswith("/")
        assert ".." not in path.split("/")
    assert len(image.layers) == len([layer for layer in image.layers if layer.contents])
    assert all(isinstance(name, str) for name in image.names)
    return image


def test_the_documents_are_an_image_as_they_are() -> None:
    for image in (outcome(lambda: of_layout(layout(*WHOLE))), outcome(lambda: of_directory(directory(*WHOLE)))):
        assert image is not None
        assert (image.config.workdir, image.config.env, image.config.volumes) == ("/x", ("A=1",), ("/v",))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["index", "manifest", "configuration"])
@pytest.mark.parametrize("form", ["layout", "dir"])
def test_an_odd_place_is_read_or_refused_in_one_line(which: int, form: str) -> None:
    images = refused = 0
    for variant in variants(WHOLE[which]):
        documents = [*WHOLE[:which], variant, *WHOLE[which + 1 :]]
        if form == "layout":
            found = outcome(partial(of_layout, layout(*documents)))
        else:
            found = outcome(partial(of_directory, directory(*documents)))
        images, refused = images + (found is not None), refused + (found is None)
    assert images > 0
    assert refused > 50 or (form == "dir" and which == 0)


@pytest.mark.parametrize("which", [0, 1], ids=["manifest.json", "configuration"])
def test_an_odd_place_in_what_docker_saved_is_read_or_refused_in_one_line(which: int) -> None:
    for variant in variants(CONFIG if which else SAVED):
        saved, config = (variant, CONFIG) if which == 0 else (SAVED, variant)
        files = Files(**{"manifest.json": json.dumps(saved).encode(), "config.json": json.dumps(config).encode()})
        outcome(partial(read_docker, files, "amd64", "", lambda config: "0" * 64))


DESCRIPTORS = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": st.sampled_from([
            KIND.format("index"), KIND.format("manifest"), "application/vnd.docker.distribution.manifest.list.v2+json",
            "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.in-toto+json", "", None, 7,
        ]),
        "platform": st.fixed_dictionaries(
            {},
            optional={
                "os": st.sampled_from(["linux", "Linux", "unknown", "windows", "", None]),
                "architecture": st.sampled_from(["amd64", "x86_64", "arm64", "unknown", "", None]),
                "variant": st.sampled_from(["v1", "v3", "", None, 7]),
            },
        ),
        "annotations": st.dictionaries(
            st.sampled_from(["org.opencontainers.image.ref.name", "io.containerd.image.name",
                             "vnd.docker.reference.type"]),
            st.sampled_from(["one", "two:1", "", None, 7, "\0", ["x"]]),
        ),
        "artifactType": st.sampled_from(["", "application/x", None]),
    },
)  # fmt: skip
TREES = st.recursive(
    st.tuples(DESCRIPTORS, st.sampled_from(["manifest", "lost", "itself"])),
    lambda inner: st.tuples(DESCRIPTORS, st.lists(inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.lists(TREES, max_size=4), st.sampled_from(["", "one", "1", "two:1", "@sha256:0"]), st.booleans())
def test_nested_indexes_of_any_descriptors_are_read_or_refused_in_one_line(
    trees: list[Any], tag: str, twice: bool
) -> None:
    files = Files(**{f"blobs/sha256/{LAYER}": b""})
    manifest = files.add({**MANIFEST, "config": {"digest": files.add(CONFIG)}})

    def described(tree: Any) -> dict[str, Any]:
        descriptor, inner = tree
        if isinstance(inner, list):
            return {**descriptor, "digest": files.add({"manifests": [described(one) for one in inner]})}
        return {**descriptor, "digest": manifest if inner == "manifest" else f"sha256:{'0' * 64}"}

    manifests = [described(tree) for tree in trees]
    files.files["index.json"] = json.dumps({"manifests": manifests * (1 + twice)}).encode()
    image = outcome(lambda: of_layout(files, tag))
    if image is not None:
        assert image.identity == manifest.removeprefix("sha256:")
    once = Files(**{**files.files, "index.json": json.dumps({"manifests": manifests}).encode()})
    assert image == outcome(lambda: of_layout(once, tag)), "an image listed twice counts once"


def test_indexes_in_each_other_end() -> None:
    files = Files(**{f"blobs/sha256/{LAYER}": b""})
    digest = files.add({**MANIFEST, "config": {"digest": files.add(CONFIG)}})
    found = []
    for _ in range(6):
        files.files["index.json"] = json.dumps({"manifests": [{"digest": digest}]}).encode()
        found.append(outcome(partial(of_layout, files)) is not None)
        digest = files.add({"manifests": [{"digest": digest}]})
    assert found == [True, True, True, True, False, False]

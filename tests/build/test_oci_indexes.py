"""Test OCI indexes: one image with several tags, several images, other platforms, and entries that are not images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.cache import Cache
from caisson.image.containers.documents import Config
from caisson.image.containers.oci import pack_image
from caisson.image.containers.store import images
from caisson.image.errors import ImageError
from caisson.image.formats.tree import Malformed
from tests.build.container_images import (
    configuration,
    file,
    layer,
    oci_layout,
    packed_directory,
    sha256,
)
from tests.build.oci_example import CONFIG, LAYERS, READ, read, rewritten

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="needs squashfs-tools")


def blob(layout: Path, document: object) -> str:
    data = json.dumps(document).encode()
    (layout / "blobs/sha256" / sha256(data)).write_bytes(data)
    return f"sha256:{sha256(data)}"


def second(layout: Path, text: bytes) -> str:
    """Add a manifest with another layer to a layout; return its digest."""
    other = layer(("second", file(text)))
    manifest = {
        "schemaVersion": 2,
        "config": {"digest": blob(layout, json.loads(configuration([other])))},
        "layers": [{"digest": f"sha256:{sha256(other)}"}],
    }
    (layout / "blobs/sha256" / sha256(other)).write_bytes(other)
    return blob(layout, manifest)


def repackaged(layout: Path, config: dict[str, Any], layers: list[dict[str, Any]] | None = None) -> None:
    """Give the image of a layout another configuration and other layers."""

    def change(index: dict[str, Any]) -> None:
        (mine,) = index["manifests"]
        manifest = json.loads((layout / "blobs/sha256" / mine["digest"].removeprefix("sha256:")).read_text())
        manifest = manifest | {"config": {"digest": blob(layout, config)}, "layers": layers or manifest["layers"]}
        mine["digest"] = blob(layout, manifest)

    rewritten(layout, change)


REF = "org.opencontainers.image.ref.name"


def test_index_with_one_manifest_under_two_tags_is_one_image(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)

    def twice(index: dict[str, Any]) -> None:
        (mine,) = index["manifests"]
        index["manifests"] = [mine | {"annotations": {REF: name}} for name in ("1", "latest")]

    rewritten(layout, twice)
    assert read(layout).config == READ
    names = {name for image in images(Cache(tmp_path / "cache")) for name in image.names}
    assert names == {"layout:1", "layout:latest"}


def test_index_with_several_images_asks_for_a_tag(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    digest = second(layout, b"x")

    def several(index: dict[str, Any]) -> None:
        (mine,) = index["manifests"]
        index["manifests"] = [
            mine | {"annotations": {REF: "one"}},
            {"digest": digest, "annotations": {"io.containerd.image.name": "example.org/x/two:2"}},
        ]

    rewritten(layout, several)
    with pytest.raises(ImageError, match=r"several images: one, example.org/x/two:2; choose one with PATH:TAG"):
        read(layout)
    cache = Cache(tmp_path / "cache")
    for source, tag, config in (
        (f"{layout}:one", "", READ),
        (f"oci:{layout}:one", "", READ),
        (str(layout), "2", Config()),
        (str(layout), "example.org/x/two:2", Config()),
        (f"{layout}@{digest}", "", Config()),
    ):
        with pack_image(source, "amd64", cache, tag=tag) as image:
            assert image.config == config, source
    with pytest.raises(ImageError, match=r"no image 'three'; it has one, example.org/x/two:2"):
        read(Path(f"{layout}:three"))
    archive = packed_directory(tmp_path / "layout.tar", layout)
    with pack_image(f"{archive}:one", "amd64", cache) as image:
        assert image.config == READ


def test_the_digest_of_a_nested_index_chooses_what_is_in_it(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    digest = second(layout, b"x")
    mine = json.loads((layout / "index.json").read_text())["manifests"]
    inner = blob(layout, {"schemaVersion": 2, "manifests": mine})
    rewritten(layout, lambda index: index.update(manifests=[{"digest": inner}, {"digest": digest}]))
    with pack_image(f"{layout}@{inner}", "amd64", Cache(tmp_path / "cache")) as image:
        assert image.config == READ


def test_attestations_signatures_and_artifacts_beside_an_image_are_left_out(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    unknown = {"os": "unknown", "architecture": "unknown"}
    in_toto = {"layers": [{"mediaType": "application/vnd.in-toto+json", "digest": f"sha256:{'1' * 64}"}]}
    signature = {"layers": [{"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json"}]}
    artifact = {"artifactType": "application/vnd.example", "layers": []}

    def beside(index: dict[str, Any]) -> None:
        index["manifests"] += [
            {"digest": f"sha256:{'2' * 64}", "platform": unknown},
            {"digest": f"sha256:{'3' * 64}", "annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
            *({"digest": blob(layout, document)} for document in (in_toto, signature, artifact)),
        ]

    rewritten(layout, beside)
    assert read(layout).config == READ


def test_of_variants_the_one_that_runs_everywhere_is_taken(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    digest = second(layout, b"x")

    def variants(index: dict[str, Any]) -> None:
        (mine,) = index["manifests"]
        platform = {"os": "linux", "architecture": "amd64"}
        index["manifests"] = [
            {"digest": digest, "platform": platform | {"variant": "v3"}},
            mine | {"platform": platform},
        ]

    rewritten(layout, variants)
    assert read(layout).config == READ


@pytest.mark.parametrize("outer", [True, False])
def test_a_document_that_is_index_and_manifest_is_refused(tmp_path: Path, outer: bool) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS)
    index = json.loads((layout / "index.json").read_text())
    (manifest,) = index["manifests"]
    document = json.loads((layout / "blobs/sha256" / manifest["digest"][7:]).read_text())
    both = document | {"manifests": index["manifests"]}
    if outer:
        (layout / "index.json").write_text(json.dumps(both | {"schemaVersion": 2}))
    else:
        rewritten(layout, lambda index: index.update(manifests=[{"digest": blob(layout, both)}]))
    with pytest.raises(Malformed, match="ambiguous"):
        read(layout)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": None}, {"architecture": ""}, {"architecture": "x86_64"}, {"os": None}, {"os": "Linux"},
        {"config": None}, {"config": {"Cmd": None, "Env": None, "Volumes": None, "User": None, "WorkingDir": None}},
        {"history": None, "created": None, "variant": None},
    ],
)  # fmt: skip
def test_what_a_configuration_leaves_out_or_calls_otherwise_is_taken_as_engines_do(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS)
    repackaged(layout, json.loads(configuration(LAYERS)) | change)
    assert read(layout).config == Config()


@pytest.mark.parametrize("platform", [None, {}, {"os": "linux"}, {"os": None, "architecture": "x86_64"}])
def test_a_descriptor_without_a_whole_platform_is_judged_by_the_configuration(
    tmp_path: Path, platform: dict[str, Any] | None
) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    rewritten(layout, lambda index: index["manifests"][0].update(platform=platform))
    assert read(layout).config == READ


def test_a_word_is_a_program_as_for_docker_and_a_variable_without_a_value_is_unset(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, Entrypoint="/bin/echo", Cmd="a b", Env=["A=1", "B", ""])
    config = read(layout).config
    assert (config.words([]), config.env) == (["/bin/echo", "a b"], ("A=1",))


@pytest.mark.parametrize("missing", [True, False])
def test_manifests_that_are_not_there_or_not_of_this_kind_are_left_out(tmp_path: Path, missing: bool) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    first = {"schemaVersion": 1, "name": "x", "fsLayers": [], "history": []}
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    other = {"digest": f"sha256:{'0' * 64}"} if missing else {"mediaType": kind, "digest": blob(layout, first)}
    rewritten(layout, lambda index: index["manifests"].insert(0, other))
    assert read(layout).config == READ
    rewritten(layout, lambda index: index["manifests"].pop())
    with pytest.raises(ImageError, match="lacks blobs/sha256/000" if missing else "none at all"):
        read(layout)


def test_a_layer_that_is_elsewhere_is_named_with_its_address(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS)
    url = "https://example.org/layer"
    kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    foreign = {"mediaType": kind, "digest": f"sha256:{'1' * 64}", "urls": [url]}
    repackaged(layout, json.loads(configuration([LAYERS[0]])), [foreign])
    with pytest.raises(ImageError, match=f"is not in the image; download it from {url}"):
        read(layout)

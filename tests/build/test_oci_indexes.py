"""OCI indexes: one image under several tags, several images, other platforms, and what is no image beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.cache import Cache
from caisson.image.containers.documents import Config
from caisson.image.containers.oci import packed
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
    """Add a manifest with another layer to a layout; returns its digest."""
    other = layer(("second", file(text)))
    manifest = {
        "schemaVersion": 2,
        "config": {"digest": blob(layout, json.loads(configuration([other])))},
        "layers": [{"digest": f"sha256:{sha256(other)}"}],
    }
    (layout / "blobs/sha256" / sha256(other)).write_bytes(other)
    return blob(layout, manifest)


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
        with packed(source, "amd64", cache, tag=tag) as image:
            assert image.config == config, source
    with pytest.raises(ImageError, match=r"no image 'three'; it has one, example.org/x/two:2"):
        read(Path(f"{layout}:three"))
    archive = packed_directory(tmp_path / "layout.tar", layout)
    with packed(f"{archive}:one", "amd64", cache) as image:
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

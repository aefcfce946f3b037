"""Test storages without mounting any: layers and their partitions, mount points in a table, and metrics' names."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.base.errors import InvalidArgument, Unsupported
from caisson.agent.base.mountinfo import mount_points
from caisson.agent.guest.metrics import Metrics, meminfo_item
from caisson.agent.guest.storage import Storage, mounts, overlay
from caisson.agent.guest.storage.storages import _group_layers

UPPER = Storage("erofs.multi-layer", "01", "ext4", "/root", ("X-kata.multi-layer=true", "noatime"))
LOWER = Storage("erofs.multi-layer", "02", "erofs", "/root", ("X-kata.overlay-lower", "X-kata.partition-number=2"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the directories created."""
    made: list[str] = []
    monkeypatch.setattr(mounts, "make_directory", lambda path, mode=0o755: made.append(path))
    return made


async def test_layers_are_mounted_below_and_the_overlay_on_top(made: list[str]) -> None:
    mounted: list[Storage] = []

    async def node(layer: Storage) -> str:
        return f"/dev/{layer.source}"

    async def mount(layer: Storage) -> None:
        mounted.append(layer)

    option = "X-kata.mkdir.path={{ mount 0 }}/upper/var:0755"
    layers = overlay.Layers([UPPER.but(options=(*UPPER.options, option)), LOWER, LOWER.but(source="03")], "c")
    await layers.mount(node, mount)
    base = "/run/kata-containers/c/multi-layer"
    assert [(one.source, one.fstype, one.mount_point, one.options) for one in mounted] == [
        ("/dev/01", "ext4", f"{base}/upper", ("noatime",)),
        ("/dev/02", "erofs", f"{base}/lower-0", ("ro",)),
        ("/dev/03", "erofs", f"{base}/lower-1", ("ro",)),
        (
            "overlay",
            "overlay",
            "/root",
            (f"lowerdir={base}/lower-0:{base}/lower-1", f"upperdir={base}/upper/upper", f"workdir={base}/upper/work"),
        ),
    ]
    assert made == [f"{base}/upper/upper/var", f"{base}/upper/upper", f"{base}/upper/work"]


@pytest.mark.parametrize("path", ["/etc", "{{ mount 0 }}", "relative", "{{ mount 2 }}/x"])
async def test_directories_of_layers_are_in_a_layer(made: list[str], path: str) -> None:
    async def anything(layer: Storage) -> str:
        return ""

    async def nothing(layer: Storage) -> None:
        pass

    upper = UPPER.but(options=(*UPPER.options, f"X-kata.mkdir.path={path}"))
    with pytest.raises(InvalidArgument, match="is not in a layer"):
        await overlay.Layers([upper, LOWER], "c").mount(anything, nothing)


@pytest.mark.parametrize("storages", [[UPPER], [LOWER], [LOWER, LOWER], [UPPER, UPPER, LOWER]])
def test_layers_that_make_no_root(storages: list[Storage]) -> None:
    with pytest.raises(InvalidArgument, match="needs one writable layer"):
        overlay.Layers(storages, "c")


def test_layers_that_are_to_be_verified_are_refused() -> None:
    with pytest.raises(Unsupported, match="dm-verity"):
        overlay.Layers([UPPER, LOWER.but(options=("X-kata.overlay-lower", "X-kata.dmverity.roothash=00"))], "c")


def test_layers_of_one_root_are_one_group() -> None:
    other = Storage("local", "local", "local", "/d")
    marked = Storage("blk", "01", "ext4", "/root", ("X-kata.multi-layer=true",))
    assert _group_layers([other, UPPER, LOWER, other]) == [[other], [UPPER, LOWER], [other]]
    assert _group_layers([marked, LOWER]) == [[marked, LOWER]]


def test_a_partition_is_found_by_its_number(tmp_path: Path) -> None:
    for name, number in (("vda1", "1"), ("vda2", "2")):
        (tmp_path / "vda" / name).mkdir(parents=True)
        (tmp_path / "vda" / name / "partition").write_text(f"{number}\n")
    (tmp_path / "vda/queue").mkdir()
    assert overlay.partition(LOWER, "/dev/vda", str(tmp_path)) == "/dev/vda2"
    assert overlay.partition(UPPER, "/dev/vda", str(tmp_path)) == "/dev/vda"
    with pytest.raises(InvalidArgument, match="there is no partition 7"):
        overlay.partition(LOWER.but(options=("X-kata.partition-number=7",)), "/dev/vda", str(tmp_path))


def test_mount_points_below_a_directory(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    lines = ("/run/a", r"/run/with\040space", r"/run/\303\244", "/run/ö", "/runner")
    table.write_text("".join(f"{n} 1 0:{n} / {path} rw - tmpfs tmpfs rw\n" for n, path in enumerate(lines)))
    assert mount_points("/run", str(table)) == ["/run/a", "/run/with space", "/run/ä", "/run/ö"]


@pytest.mark.parametrize(
    ("line", "item"),
    [
        ("MemTotal", "mem_total"),
        ("Active(anon)", "active_anon"),
        ("SReclaimable", "s_reclaimable"),
        ("KReclaimable", "k_reclaimable"),
        ("HugePages_Total", "hugepages_total"),
        ("Committed_AS", "committed_as"),
        ("VmallocTotal", "vmalloc_total"),
        ("DirectMap2M", "direct_map_2M"),
        ("Percpu", "per_cpu"),
    ],
)
def test_memory_has_the_names_that_dashboards_know(line: str, item: str) -> None:
    assert meminfo_item(line) == item


def test_what_the_kernel_does_not_tell_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        2 kB\nHugePages_Free:    3\n")
    (tmp_path / "loadavg").write_text("0.10 0.20 0.30 1/80 123\n")
    (tmp_path / "diskstats").write_text('   8   0 s"a 1 2 3\n')
    text = Metrics(str(tmp_path)).text()
    assert 'kata_guest_meminfo{item="mem_total"} 2048\n' in text
    assert 'kata_guest_meminfo{item="hugepages_free"} 3\n' in text
    assert 'kata_guest_tasks{item="max"} 80\n' in text
    assert 'kata_guest_diskstat{disk="s\\"a",item="sectors_read"} 3\n' in text
    assert "vm_stat" not in text and "total_rss" not in text


def test_options_are_split_into_flags_propagation_and_data() -> None:
    words = ["ro", "nosuid", "exec", "suid", "async", "rprivate", "size=1m", "", "nouuid"]
    assert mounts.parse_options(words) == (0x1 | 0x2, [1 << 18 | 0x4000], "size=1m,nouuid")
    assert mounts.option(words, "size") == "1m" and mounts.option(words, "mode") == ""

"""Drive the agent with containerd's own ttrpc library, in Go: calls, errors, deadlines, a thousand at once.

Its stubs are generated from our .proto files, in the test's build directory.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc_tools
import pytest
from grpc_tools import protoc

from caisson.proto import generate
from caisson.proto.kata3 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent
from tests.native.conftest import check_nothing_is_left
from tests.support.golang import Module

pytestmark = pytest.mark.root

MODULE = "caisson.test/ttrpc"
PROTOS = ("agent", "csi", "health", "oci", "types")
GENERATORS = ("github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc", "google.golang.org/protobuf/cmd/protoc-gen-go")

BUILD_TIMEOUT, RUN_TIMEOUT = 600, 120


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the program in go_ttrpc."""
    module = Module(Path(__file__).with_name("go_ttrpc"), tmp_path_factory.mktemp("go") / "ttrpc")
    for generator in GENERATORS:
        module.build(generator, generator.rpartition("/")[2])
    _generate_stubs(module.path)
    return module.build(".", "driver")


def _generate_stubs(build: Path) -> None:
    root = build / "protos"
    (root / "caisson").mkdir(parents=True)
    (root / "caisson/proto").symlink_to(generate.HERE)
    names = [f"caisson/proto/kata3/{name}.proto" for name in PROTOS]
    words = ["protoc", f"-I{root}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    for kind in ("go", "go-ttrpc"):
        words += [f"--plugin=protoc-gen-{kind}={build / f'protoc-gen-{kind}'}", f"--{kind}_out={build}"]
        words += [f"--{kind}_opt={option}" for option in (f"module={MODULE}", *(f"M{n}={MODULE}/kata" for n in names))]
    assert protoc.main([*words, *names]) == 0


@pytest.fixture
def running(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> Iterator[RunningAgent]:
    """Start a fresh agent."""
    agent = RunningAgent(tmp_path, nsexec_path, busybox_rootfs)
    yield agent
    agent.stop()
    check_nothing_is_left(agent, tmp_path)


@pytest.mark.timeout(BUILD_TIMEOUT + RUN_TIMEOUT)
def test_gos_ttrpc_library_drives_the_agent(driver: Path, running: RunningAgent, tmp_path: Path) -> None:
    container = agent_pb2.CreateContainerRequest(
        container_id="box",
        exec_id="box",
        OCI=oci_pb2.Spec(
            Version="1.0.2",
            Process=oci_pb2.Process(Args=["/bin/cat"], Cwd="/"),
            Root=oci_pb2.Root(Path=str(running.rootfs)),
            Linux=oci_pb2.Linux(Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in ("mount", "ipc", "uts")]),
        ),
    )
    (tmp_path / "request").write_bytes(container.SerializeToString())
    done = subprocess.run(
        [driver, running.socket, tmp_path / "request"], capture_output=True, text=True, timeout=RUN_TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    assert results["check"] == "SERVING"
    errors = results["errors"]
    assert errors["unknown method"] == {"code": "Unimplemented", "text": "/grpc.AgentService/Nothing: unknown method"}
    assert errors["unknown service"] == {"code": "Unimplemented", "text": "/grpc.Nothing/Check: unknown method"}
    assert errors["no container"]["code"] not in ("OK", "Unimplemented", "Unknown")
    assert errors["no container"]["text"]
    assert errors["too long"]["code"] != "OK"
    assert results["deadline"]["code"] == "DeadlineExceeded"
    assert results["at once"] == {"given up": 1000, "answered": 1000}
    assert results["copied"] is True
    # The deadline was transmitted, and enforced by the agent as well.
    log = [json.loads(line) for line in running.log.read_text().splitlines()]
    late = [line for line in log if line.get("method") == "GetOOMEvent" and line["status"] == "DEADLINE_EXCEEDED"]
    assert len(late) == 1

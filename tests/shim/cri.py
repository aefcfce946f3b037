"""Run containerd with its CRI plugin in a network namespace, the node's, and drive it with crictl."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from caisson.agent.pods.holder import Holder
from caisson.agent.pods.network import inside, run
from tests.shim.engine import COMMAND_TIMEOUT, await_answer, environment_of, rootfs, unmount

PACKAGES = ("containerd", "containernetworking-plugins")

#: Seconds to fetch a page.
FETCH_TIMEOUT = 30.0

#: The part common to all versions of the file.
PLACES = """\
root = "{place}/root"
state = "{place}/state"
[grpc]
  address = "{place}/containerd.sock"
[ttrpc]
  address = "{place}/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{place}/opt"
"""

CONFIGURATION = (
    "version = 2\n"
    + PLACES
    + """\
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/pause:latest"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{place}/tree/usr/lib/cni"
  conf_dir = "{place}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.caisson]
  runtime_type = "io.containerd.caisson.v2"
  privileged_without_host_devices = true
"""
)

#: Point-to-point links for both families, and ports of the node.
NETWORK: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {"type": "ptp", "ipam": {"type": "host-local",
                                 "ranges": [[{"subnet": "10.213.7.0/24"}], [{"subnet": "fd00:213:7::/64"}]],
                                 "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}  # fmt: skip


class Cri:
    """A running containerd.  ``place`` is its directory, ``node`` the path of its network namespace."""

    def __init__(self, place: Path, crictl: Path, environment: dict[str, str], node: str) -> None:
        self.place = place
        self.node = node
        endpoint = f"unix://{place}/containerd.sock"
        settings = {"runtime-endpoint": endpoint, "image-endpoint": endpoint, "timeout": 60}
        (place / "crictl.yaml").write_text(json.dumps(settings))
        self._command = ["nsenter", f"--net={node}", str(crictl), "--config", f"{place}/crictl.yaml"]
        self._environment = environment
        self._count = 0

    def crictl(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a crictl command to completion."""
        command = [*self._command, *words]
        return subprocess.run(command, input=stdin, env=self._environment, capture_output=True, timeout=COMMAND_TIMEOUT)

    def ctr(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a ctr command to completion."""
        command = ["ctr", "--address", f"{self.place}/containerd.sock", "--namespace", "k8s.io", *words]
        return subprocess.run(command, env=self._environment, capture_output=True, timeout=COMMAND_TIMEOUT)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a crictl command that runs until it is killed."""
        return subprocess.Popen([*self._command, *words], env=self._environment, stdout=subprocess.PIPE)

    def output(self, *words: str) -> str:
        """Return the output of a crictl command, which must succeed."""
        done = self.crictl(*words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def pod(self, runtime: str, **config: Any) -> str:
        """Run a pod sandbox; return its id."""
        self._count += 1
        name = f"pod{self._count}"
        metadata = {"name": name, "uid": f"{name}-uid", "namespace": "default", "attempt": 1}
        document = {"metadata": metadata, "log_directory": f"{self.place}/logs", "linux": {}, **config}
        self._file("pod").write_text(json.dumps(document))
        return self.output("runp", "--runtime", runtime, str(self._file("pod")))

    def container(self, pod: str, *command: str, **config: Any) -> str:
        """Create and start a container in the most recent pod; return its id."""
        self._count += 1
        name = f"c{self._count}"
        document = {
            "metadata": {"name": name}, "image": {"image": "docker.io/library/busybox:latest"}, "command": command,
            "log_path": f"{name}.log", "linux": {}, **config,
        }  # fmt: skip
        self._file("container").write_text(json.dumps(document))
        made = self.output("create", "--no-pull", pod, str(self._file("container")), str(self._file("pod")))
        self.output("start", made)
        return made

    def inspect(self, container: str) -> dict[str, Any]:
        """Return a container's status."""
        status: dict[str, Any] = json.loads(self.output("inspect", container))["status"]
        return status

    def addresses(self, pod: str) -> list[str]:
        """Return a pod's IP addresses."""
        network = json.loads(self.output("inspectp", pod))["status"]["network"]
        return [network["ip"], *(one["ip"] for one in network.get("additionalIps") or ())]

    def fetch(self, address: str) -> bytes:
        """Return what a web server sends to the node."""

        def get() -> bytes:
            with urllib.request.urlopen(f"http://{address}/", timeout=FETCH_TIMEOUT) as answer:
                return bytes(answer.read())

        page: bytes = inside(self.node, get)
        return page

    def remove(self, pod: str) -> None:
        """Stop and remove a pod with its containers."""
        self.output("stopp", pod)
        self.output("rmp", "--force", pod)

    def vms(self) -> list[str]:
        """Return the names of the running VMs."""
        return sorted(path.name for path in Path(self._environment["CAISSON_RUN"]).glob("pod-*"))

    def _file(self, kind: str) -> Path:
        return self.place / f"{kind}.json"


#: The same for containerd 2.x, where the Sandbox service creates pods of the second runtime.
CONFIGURATION_2 = (
    "version = 3\n"
    + PLACES
    + """\
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "docker.io/library/pause:latest"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{place}/tree/usr/lib/cni"]
  conf_dir = "{place}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.caisson]
  runtime_type = "io.containerd.caisson.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.sandboxed]
  runtime_type = "io.containerd.caisson.v2"
  sandboxer = "shim"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.snapshotter.v1.erofs"]
  default_size = "64MiB"
"""
)


@contextlib.contextmanager
def cri(crictl: Path, configuration: str = CONFIGURATION, programs: Sequence[Path] = ()) -> Iterator[Cri]:
    """Start containerd with busybox and a pause image; at the end nothing of it is left.

    ``programs`` replace the distribution's.
    """
    place = Path(tempfile.mkdtemp(prefix="cs-"))  # short, for sockets
    process = None
    node = Holder()
    node.open()
    try:
        run(node.namespace, "ip", "link", "set", "lo", "up")
        environment = environment_of(place, PACKAGES, configuration)
        for program in programs:
            (place / "bin" / program.name).symlink_to(program)
        (place / "cni").mkdir()
        NETWORK["plugins"][0]["ipam"]["dataDir"] = f"{place}/addresses"
        (place / "cni/10-pods.conflist").write_text(json.dumps(NETWORK))
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                ["nsenter", f"--net={node.namespace}", "containerd", "-c", str(place / "containerd.toml")],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        ctr = ["ctr", "--address", f"{place}/containerd.sock", "--namespace", "k8s.io"]
        await_answer([*ctr, "version"], environment, place)
        for name, command in (("busybox", ["sh"]), ("pause", ["sleep", "1000000"])):
            archive = place / f"{name}.tar"
            archive.write_bytes(oci_archive(f"docker.io/library/{name}:latest", command))
            subprocess.run([*ctr, "images", "import", str(archive)], env=environment, check=True, capture_output=True)
        made = Cri(place, crictl, environment, node.namespace)
        try:
            yield made
        finally:
            made.crictl("rmp", "--all", "--force")
    finally:
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        node.close()
        unmount(place)
        shutil.rmtree(place, ignore_errors=True)


def oci_archive(name: str, command: list[str]) -> bytes:
    """Return an image with busybox: an OCI layout in an archive.  Source: OCI image specification, image-layout.md."""
    blobs: dict[str, bytes] = {}

    def add(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": f"sha256:{digest}", "size": len(data)}

    layer = add(rootfs(), "layer.v1.tar")
    settings = {"Env": ["PATH=/bin"], "Cmd": command}
    config = {
        "architecture": "amd64", "os": "linux", "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }  # fmt: skip
    described = add(json.dumps(config).encode(), "config.v1+json")
    manifest = {"schemaVersion": 2, "config": described, "layers": [layer]}
    entry = add(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"}
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    with BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, data in blobs.items():
                member = tarfile.TarInfo(path)
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
        return buffer.getvalue()

"""Facts that the guest's side and the host's side have to agree on: ports, paths, and lines on the console.

Either half imports them from here, so that neither imports the other.
"""

from __future__ import annotations

#: The version of the whole project: of the package, the agent, and what images, snapshots and VMs are marked with.
VERSION = "0.2.0"

#: The format of a running VM's directory and of its supervisor's messages; other versions of Caisson read it, too.
VM_FORMAT = 1

#: vsock port of the agent's API, as of Kata Containers' agents.
AGENT_PORT = 1024

#: vsock port of the host where spans of traced requests arrive.
TRACE_PORT = 6831

#: The directory of a guest that holds the agent, nsexec and the default container's root file system.
GUEST_HOME = "/usr/lib/caisson"

#: The root file system of the default container, in the guest.
BUSYBOX_ROOTFS = f"{GUEST_HOME}/containers/busybox"

#: The directory of a guest in which hosts put the files of containers, as Kata's do: where a pod's share is mounted.
GUEST_SHARED = "/run/kata-containers/shared/containers"

#: The tmpfs of a guest that all containers of a pod have as /dev/shm, likewise.
GUEST_SHM = "/run/kata-containers/sandbox/shm"

#: How every line begins that the agent itself prints on the console or in the kernel's log.
CONSOLE_PREFIX = "caisson agent: "

#: How the line begins that the agent prints on the console as soon as it serves requests.
READY_LINE = "caisson agent ready on"

#: The line in the kernel's log that ties its clock to CLOCK_MONOTONIC, followed by microseconds.
CLOCK_LINE = f"{CONSOLE_PREFIX}clock"

"""Conformance tests run on an agent of this machine, as the native ones do."""

from tests.native.conftest import agent, busybox_rootfs, nsexec_path

__all__ = ["agent", "busybox_rootfs", "nsexec_path"]

"""ttrpc: calls over a byte stream without HTTP/2; the protocol of Kata 3.x agents and of containerd's shims."""

"""What containerd and a shim say to each other."""

"""Give a VM its virtio-vsock device: the kernel's vhost-vsock with a relay, or our own vhost-user device."""

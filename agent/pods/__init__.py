"""What a pod needs of its host, whoever runs pods: a VM, its network, and the guest's side of both."""

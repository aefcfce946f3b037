"""The resources of a pod on its host, for any runner of pods: a VM, its network, and the guest's side of both."""

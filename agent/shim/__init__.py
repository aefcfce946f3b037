"""containerd's runtime v2 shim: containers and pods of docker, ctr, nerdctl and Kubernetes, each pod in a VM."""

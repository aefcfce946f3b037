"""The agent API of Kata Containers 3.x and 4.x, and the service that their shims take virtual machines from."""

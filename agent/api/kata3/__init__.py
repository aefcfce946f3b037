"""The agent API of Kata Containers 3.x and 4.x, over ttrpc."""

"""Build guest images: definition, steps, cache, lock, manifest."""

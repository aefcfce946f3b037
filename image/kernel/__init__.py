"""The guest's kernel: packages, sources, configuration fragments."""

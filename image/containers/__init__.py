"""Container images: layouts, archives, layers."""

"""What the frames of ttrpc carry."""

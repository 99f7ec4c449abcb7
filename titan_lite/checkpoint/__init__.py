"""Checkpoints: complete or absent, checksummed, free of pickle, resharded to any layout."""

"""One home for every operation that rounds."""

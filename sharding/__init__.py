"""Where arrays live and in which order they are summed."""

"""The host half: requests, pages, scheduling, in plain Python. Imports neither jax nor numpy."""

"""Decoders: one shared forward pass, one short file a family."""

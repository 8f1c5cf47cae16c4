"""Reinforcement learning on the engine's own forward pass."""

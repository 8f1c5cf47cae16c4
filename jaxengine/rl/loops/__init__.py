"""Loops around generating and learning."""

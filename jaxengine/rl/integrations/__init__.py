"""Other libraries' names for our policy and engine."""

"""The model that ships: its problems, how it was made, and how reward teaches it."""

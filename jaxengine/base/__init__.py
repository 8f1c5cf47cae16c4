"""Small helpers under everything: arguments, keys, pytrees, progress, the machine."""

"""The stages of ../accelerator.py, a file each, and what runs them: each in a process of its own (supervise.py)."""

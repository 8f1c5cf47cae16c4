"""Where the two halves meet: schedule, run, collect."""

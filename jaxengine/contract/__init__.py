"""The contract on the user's own machine: compare by bits, verify, report."""

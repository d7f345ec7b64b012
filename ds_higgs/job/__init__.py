"""One process among others: ranks, launcher, stopping, failures, exit."""

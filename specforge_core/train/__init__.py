"""The trainer: one loop for every strategy, FSDP2, exact resume."""

"""Training: the one loop, its tasks, and what they stand on."""

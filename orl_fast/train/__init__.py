"""Training: the loop, its step, metrics and checkpoints, and which run a command is about."""

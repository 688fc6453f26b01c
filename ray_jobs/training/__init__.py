"""Training on Ray Train: the worker loop, its trainer, its data and its callbacks."""

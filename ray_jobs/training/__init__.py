"""Training on Ray Train: trainer, worker loop, data, callbacks and checkpoints."""

"""Training: one loop, with tasks that define losses and engines that update weights."""

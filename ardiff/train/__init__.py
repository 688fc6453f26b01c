"""One training loop, its tasks, its engines."""

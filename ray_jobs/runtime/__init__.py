"""What every job stands on: the Ray cluster, the console, progress, stages and the error log."""

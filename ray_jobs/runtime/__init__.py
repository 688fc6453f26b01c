"""Shared by all jobs: the Ray cluster, the console, progress, stages, the error log and the job client."""

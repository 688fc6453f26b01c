"""Metrics of a generated video and its original, one file each."""

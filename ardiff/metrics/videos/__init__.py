"""Metrics of generated videos alone, without originals, one file each."""

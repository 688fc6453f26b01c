"""Metrics of a set of generated videos against a set of real ones, one file each."""

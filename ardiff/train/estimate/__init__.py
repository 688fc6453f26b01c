"""Estimates before there is a cluster: memory and time of a training step, and cost of the jobs.

``docs/scaling.md`` has the formulas and the figures for the paper's sizes.
"""

"""Scores: Frechet video distance, reconstruction, motion; each with its protocol."""

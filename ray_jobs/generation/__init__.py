"""Video generation on Ray Data actors."""

"""The feature networks of the published metrics, with the public names of their parameters."""

"""Writes the videos of tables as files, for the prepare job."""

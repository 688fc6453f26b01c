"""Encodes the captions, for the encode job."""

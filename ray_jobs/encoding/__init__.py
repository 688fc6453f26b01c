"""Parts of the encode job."""

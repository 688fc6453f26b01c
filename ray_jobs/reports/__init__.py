"""Report pages: HTML and PNG files written at the end of a job."""

"""Parts of the Ray Serve deployment: autoscaling and configuration checks."""

"""The Ray Serve deployment: autoscaling and checks of its configuration."""

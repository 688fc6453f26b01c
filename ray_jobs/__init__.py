"""The cluster: jobs that wire `ardiff` into Ray Data, Ray Train and Ray Serve. No mathematics here."""

"""The endpoint without a cluster: HTTP API, page, jobs in a database, and the loop of the sampling engine.

``ray_jobs/serve.py`` runs it as Ray Serve replicas; any ASGI server can run one. See
:mod:`ardiff.serving.replica` for the way of a request.
"""

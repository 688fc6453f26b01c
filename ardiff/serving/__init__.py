"""The endpoint without a cluster: jobs in shared storage, the engine's loop, the HTTP interface, the page.

``ray_jobs/serve.py`` runs it on Ray Serve replicas; any ASGI server runs it alone.
"""

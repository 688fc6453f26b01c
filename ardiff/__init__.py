"""AR-Diffusion: asynchronous video generation with auto-regressive diffusion.

``ardiff`` is the method and never imports Ray; ``ray_jobs`` runs it on a cluster.
"""

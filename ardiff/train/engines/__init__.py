"""Engines: how a loss updates the weights. The loop uses only :class:`ardiff.train.engines.base.Engine`."""

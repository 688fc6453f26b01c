"""Checks of a cluster for `ardiff doctor --address`: its nodes and their network."""

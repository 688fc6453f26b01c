"""Evaluation on Ray Data: configurations, datasets, feature extraction, metrics, drift and the quick evaluation."""

"""Evaluation on Ray Data: data sets, features, set metrics and the quick protocol."""

"""Benchmarks of plans and predictions, which run no attention."""

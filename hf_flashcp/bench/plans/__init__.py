"""Benchmarks that plan and predict, and run no attention."""

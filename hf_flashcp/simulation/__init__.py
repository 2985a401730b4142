"""Simulates training steps: this library beside other implementations, and the cp_size that a window needs."""

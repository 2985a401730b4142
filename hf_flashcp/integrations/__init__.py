"""Integration with transformers, accelerate and TRL: attention, batches, device mesh and trainers.

This file imports nothing, because `registration` must be importable while transformers itself is being imported.
"""

"""Trainers of transformers and TRL with context parallelism."""

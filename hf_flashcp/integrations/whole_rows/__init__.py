"""Forwards over whole padded rows: the rows become documents of a plan, and per-token outputs become rows again.

What reads the outputs, such as the losses of preference and RL trainers, sees ordinary data parallelism.
"""

"""Where transformers and accelerate meet the library: attention, batches, mesh, trainers.

Nothing is imported here: `registration` must be importable while transformers itself is being imported.
"""

"""transformers and TRL trainers under context parallelism."""

"""What attaching changes in a transformers model: forwards, mixers, rotary embeddings, router losses."""

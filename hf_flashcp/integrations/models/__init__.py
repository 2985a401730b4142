"""Changes to the models of transformers that are attached: forwards, mixers, rotary embeddings and router losses."""

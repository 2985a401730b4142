"""Other implementations of context parallelism beside ours, and which cp_size a window needs."""

"""`flashcp bench gpu`: what one run on a GPU can establish, step by step; docs/gpu.md says what the steps show."""

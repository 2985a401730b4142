"""`flashcp bench gpu`: checks and measurements on a GPU, step by step; docs/gpu.md explains the steps."""

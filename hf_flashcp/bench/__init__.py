"""Measurements. Each module has one `measure` function that returns plain data; `flashcp bench` prints it."""

"""Measurements for `flashcp bench`: in each module, `measure` returns plain data and `text` formats it."""

"""Measurement of a hardware profile on this machine's CPU cores."""

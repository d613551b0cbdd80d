"""Measured comparisons with peers: each a command that prints a table and writes JSON."""

"""Clicks to pairs."""

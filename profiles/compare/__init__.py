"""Compares figures: `enginecast bench compare`."""

"""Measures servers under load: `enginecast bench --serve`."""

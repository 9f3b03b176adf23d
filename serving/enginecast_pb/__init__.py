"""Stubs of proto/, made by `python -m serving.generate`. Do not edit."""

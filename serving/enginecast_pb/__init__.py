"""Stubs of proto/enginecast/v1, made by `python -m serving.generate`. Do not edit."""

"""The Python API (`import enginecast`): requests as keyword arguments, results as arrays and text."""

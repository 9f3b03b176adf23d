"""Core ML's Model Intermediate Language (MIL): canonical graphs as MIL programs, packages on disk, and programs
interpreted with numpy.
"""

"""Workers of other tools, each run by the Python of its peer's environment (profiles/protocol.py)."""

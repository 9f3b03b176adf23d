"""What other tools make of a checkpoint before they run it, each run by the Python of its peer's environment:
`python -m profiles.peers.exports.NAME CHECKPOINT FOLDER`.
"""

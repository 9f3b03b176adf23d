"""Other tools, measured beside ours on the same checkpoint: `enginecast bench peers`."""

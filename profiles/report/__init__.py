"""Reports of measured rows: `enginecast bench report`."""

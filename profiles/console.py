"""Where the measuring commands print: tables to standard output, progress to standard error."""

from __future__ import annotations

import sys
from typing import Final

from rich.console import Console

WIDTH: Final = 160
"""Of tables that do not go to a terminal, in characters."""
out: Final = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
notes: Final = Console(highlight=False, stderr=True)

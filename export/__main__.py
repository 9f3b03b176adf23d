"""`python -m export build ...`"""

from export.cli.commands import main

main()

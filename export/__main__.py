"""`python -m export build ...`"""

from export.cli import main

main()

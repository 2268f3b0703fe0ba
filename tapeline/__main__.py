"""``python -m tapeline``."""

from tapeline.cli import main

main()

"""`python -m gapprobe` is the command line."""

from gapprobe.cli import main

main()

"""`python -m headrace`: the same as `headrace`."""

from headrace.cli import main

main()

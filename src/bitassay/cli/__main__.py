"""`python -m bitassay.cli` is the same as `bitassay`."""

from bitassay.cli import main

main()

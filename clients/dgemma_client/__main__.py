"""`python -m dgemma_client` is the command `dgemma`."""

from dgemma_client.cli import main

main()

"""`python -m dgemma_openai` is `dgemma-openai`."""

from dgemma_openai.cli import main

main()

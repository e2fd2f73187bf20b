"""The acceptance table: `python -m dgemma_build.accept`."""

"""The benchmark against transformers: `python -m dgemma_build.bench`."""

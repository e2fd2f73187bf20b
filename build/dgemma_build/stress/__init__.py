"""Many clients of every kind against a real server, bounded in time: `python -m dgemma_build.stress`."""

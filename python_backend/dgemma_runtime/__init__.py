"""One serving process for DiffusionGemma: requests, scheduling, KV pages, sampling, stopping and engines."""

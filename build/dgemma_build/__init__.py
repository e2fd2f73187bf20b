"""Checkpoint to engine: export, builders, manifests, parity reports, and the demo checkpoint."""

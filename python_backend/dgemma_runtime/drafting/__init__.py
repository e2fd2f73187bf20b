"""Canvases that do not start from noise: who proposes them, what is pinned, what came of it."""

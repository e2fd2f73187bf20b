"""What a GPU makes of the kernels: numbers against PyTorch, speed against the card's own, one whole denoising step."""

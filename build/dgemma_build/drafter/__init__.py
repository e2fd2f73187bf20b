"""The drafter: a small network that proposes a whole canvas in one pass from the denoiser's keys and values."""

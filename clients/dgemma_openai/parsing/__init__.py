"""Between what HTTP APIs tell of messages and turns and what Gemma's chat template and model write. Pure functions."""

"""The demo checkpoint: generated skills, tokenizer, training and evaluation."""

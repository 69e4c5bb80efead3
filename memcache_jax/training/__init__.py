"""Training: data, tokenizers and the training loop."""

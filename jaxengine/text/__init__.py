"""Text in and out: tokenizer, chat template, streaming, stop strings. Imports no jax."""

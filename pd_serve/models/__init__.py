"""Decoder definitions, model configuration, weights, GGUF conversion, tokenizer files."""

"""Text encoders: frozen networks of the package transformers that turn captions and prompts into token states."""

"""All that exists for the authors' checkpoints: their models, tensor names and file formats (docs/upstream.md)."""

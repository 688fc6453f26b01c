"""Storage, manifests, decoding, encoding, clips, latents, training streams and the synthetic data set."""

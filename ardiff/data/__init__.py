"""Videos in and out: storage, manifests, decoding, encoding, clips, latents and the synthetic data set."""

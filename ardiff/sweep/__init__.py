"""Sets of videos: specs say what to generate, records what came of it; batches, retries, manifests and summaries."""

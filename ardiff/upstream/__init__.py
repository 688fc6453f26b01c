"""The authors' released checkpoints: read without unpickling, checked key by key, made into models of ours."""

from ardiff.upstream.models import ReleasedAutoencoder, load_dit, load_vae

__all__ = ["ReleasedAutoencoder", "load_dit", "load_vae"]

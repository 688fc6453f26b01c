"""Diffusion without a model: noise, training timesteps, inference schedules, losses and the reference sampler."""

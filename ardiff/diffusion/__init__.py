"""The method without a model: noise, timestep laws (FoPP), inference schedules (AD), losses, samplers."""

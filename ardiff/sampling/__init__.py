"""Fast exact sampling: only frames that move are evaluated, finished ones are remembered, videos share passes."""

from ardiff.sampling.engine import EngineConfig, FinishedFrames, SampleRequest, SamplingEngine, why_not_cached

__all__ = ["EngineConfig", "FinishedFrames", "SampleRequest", "SamplingEngine", "why_not_cached"]

"""On-policy distillation of language models in JAX: prompt -> rollout -> score -> signal -> estimate -> update -> metrics."""

__version__ = "0.1.0"

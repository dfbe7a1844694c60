"""TCA runtime: LLM serving with a KV cache pruned per head and shared by prefix."""

__version__ = "0.1.0"

"""The quality lab: what a sparse KV cache costs in accuracy, measured through the runtime."""

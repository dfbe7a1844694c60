"""Load generator for any OpenAI- or SGLang-compatible server."""

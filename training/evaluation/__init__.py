"""How good a NoteLLM is, measured beside simpler systems in the same run."""

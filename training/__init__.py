"""Torch: the NoteLLM module that export and training share."""

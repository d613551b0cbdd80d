"""The words and the model: messages, settings, prompt, bundle, encoder.

Light on purpose: no torch, no Kafka client, no Milvus client, and nothing else of this project.
"""

__version__ = "0.1.0"

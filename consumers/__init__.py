"""The updater: Kafka -> encoder -> Milvus, and everything that makes it lose nothing."""

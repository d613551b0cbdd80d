"""What a person types: ``notellm COMMAND``."""

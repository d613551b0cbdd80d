"""Export: a checkpoint becomes a bundle, with a proof that the bundle equals the checkpoint."""

"""What training on co-clicks is worth, item to item, beside what it has to beat: ``python -m benchmarks.i2i``."""

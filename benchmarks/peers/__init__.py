"""What ours are compared with."""

"""Click streams: the Faust app, the co-occurrence engine, and the job that refreshes the training pairs."""

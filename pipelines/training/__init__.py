"""Training: one loop for every objective, and the Ray Train shell that runs it on many workers."""

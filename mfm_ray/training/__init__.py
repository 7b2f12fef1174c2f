"""Training on a cluster: Ray Train runs the workers, DeepSpeed shards them, and nothing below knows of either."""

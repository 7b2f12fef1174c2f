"""Training on Ray Train with DeepSpeed. The modules here are imported by name, so that importing one of them stays light."""

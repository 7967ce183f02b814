"""What distillation costs: per training step in both zoos, and per loss."""

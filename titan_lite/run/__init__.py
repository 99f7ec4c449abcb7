"""What surrounds the training loop: signals, logging, metrics, validation."""

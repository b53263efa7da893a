"""What a machine can run."""

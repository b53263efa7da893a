"""What is in a model, and what is slow in it."""

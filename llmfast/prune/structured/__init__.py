"""Methods that make a checkpoint smaller, one file each."""

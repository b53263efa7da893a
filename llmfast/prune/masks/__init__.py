"""Methods that set weights of a graph to zero, one file each."""

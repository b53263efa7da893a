"""The commands, one file each: options, one call of a stage, what is printed. Stages are imported when they run."""

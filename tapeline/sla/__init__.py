"""Are the promises kept, and if not, whose fault is it."""

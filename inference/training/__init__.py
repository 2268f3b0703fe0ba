"""Training and judging a model on recorded events, with the windows that serving makes."""

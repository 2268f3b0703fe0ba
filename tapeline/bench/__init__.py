"""Load of our own on a running processor or model, and what came of it."""

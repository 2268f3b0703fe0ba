"""Tapeline beside its peers: the same events, broker, model and machine, in turns."""

"""Recorded events, from files or a topic, as what ``inference.training`` learns from."""

"""What the outside sees of a running processor: Prometheus metrics, and where they are."""

"""The lanes measured: ``python -m benchmarks.lanes overload | low-load | burst``."""

"""Failure drills on real parts: load, a fault, and a ledger at the end."""

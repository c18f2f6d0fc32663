"""Adapters around a frozen model. Knows no method by name."""

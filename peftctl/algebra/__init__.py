"""Arithmetic on adapter folders: look into them, compare, combine, change their rank; no base model is loaded."""

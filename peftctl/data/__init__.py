"""Rows to batches: sources, formats, chat templates and what is trained of them."""

"""What a row is, what the loss is and what is measured: one file for each task."""

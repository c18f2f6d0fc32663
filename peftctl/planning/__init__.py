"""What a run needs, from its configuration alone: the run itself, on tensors that have a shape and no content."""

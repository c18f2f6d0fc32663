"""What a model is worth: metrics over rows it was not trained on."""

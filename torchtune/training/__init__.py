"""What a training loop needs besides the model and the data."""

"""What is run on both sides."""

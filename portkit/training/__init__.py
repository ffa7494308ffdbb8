"""Training from scratch: text to tokens, the loop, step checkpoints, a folder that loads."""

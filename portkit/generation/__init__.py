"""Text from a loaded model: sampling, the decode loop, stop conditions."""

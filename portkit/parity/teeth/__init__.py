"""What a probe would have caught, of faults and of the config; and why a site differs."""

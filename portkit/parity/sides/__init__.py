"""Who is compared, and how one stands at each of their tensors."""

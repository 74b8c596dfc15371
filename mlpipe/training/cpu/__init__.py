"""What training on processors needs, and on GPUs does not."""

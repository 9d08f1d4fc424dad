"""The two-stage training of screenshot-to-code models."""

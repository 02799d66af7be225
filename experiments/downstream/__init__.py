"""Trained Transformers on texts or images, and what replaces their attention."""

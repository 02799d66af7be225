"""Attentions trained from scratch on digits, with one budget."""

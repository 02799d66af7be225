"""Every attention of a frozen teacher replaced, without retraining."""

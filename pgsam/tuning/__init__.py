"""Parameter-efficient tuning, put on an encoder or decoder from outside."""

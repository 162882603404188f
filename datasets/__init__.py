"""Datasets: organ tables, slice and volume readers, augmentation, and a procedural phantom."""

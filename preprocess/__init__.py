"""From raw scans to training slices and test volumes."""

"""The foundation model: SAM's image encoder at any size in 2-D and 3-D, and the reading of its weights."""

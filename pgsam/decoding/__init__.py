"""From an image embedding to masks: class tokens, fusion of levels, refinement."""

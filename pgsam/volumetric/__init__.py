"""M-SAM: SAM-Med3D with a mask-enhanced adapter, clicks and refinement; only what is truly three-dimensional."""

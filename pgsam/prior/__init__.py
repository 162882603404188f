"""What text knows: reports, a frozen text encoder, and their alignment with the image."""

"""Models larger than memory: decoder layers left on disk, and clones that share them."""

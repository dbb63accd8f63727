"""Images: where they come from, how they are split, and the memory-mapped arrays that all stages read."""

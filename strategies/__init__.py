"""One file per paper, both halves of its algorithm box; and the edge to Flower."""

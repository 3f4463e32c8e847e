"""One matrix by itself: grids, scales, rounding of weights to codes, packing."""

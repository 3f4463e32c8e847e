"""The same model in another basis: rotation and smoothing, before codes are made."""

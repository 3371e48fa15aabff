"""Optimizers that see a leaf as matrices: layouts, orthogonalisation, and what is built of them."""

"""Toy experiments and the paper's figures, on top of `theory`; one module per experiment."""

"""The backends: one module per way of running the operators. `clipfast.ops` alone chooses between them."""

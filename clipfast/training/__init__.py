"""Training and evaluation: `clipfast train`, `clipfast eval`, and the parts that they are made of."""

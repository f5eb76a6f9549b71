"""`clipfast profile`: where the time goes, per operator and per layer, and from file to embedding."""

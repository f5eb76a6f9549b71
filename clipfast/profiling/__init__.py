"""`clipfast profile`: where the time goes, per operator and per layer, and from file to embedding.

Built for a GPU too, and not yet run on one.
"""

"""`clipfast bench`: whole models against every CLIP that is installed, checked against float64, then timed."""

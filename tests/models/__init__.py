"""Models of other packages, with random weights."""

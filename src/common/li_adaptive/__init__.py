"""Li, Neural Network as Complex Adaptive System and Its Emergent Benign Loss Landscape."""

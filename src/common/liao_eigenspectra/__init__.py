"""Liao, Mahoney (2021), Hessian Eigenspectra of More Realistic Nonlinear Models."""

"""Hessians: exact blocks, operators, spectra."""

"""Predictions of the papers, one file per theory."""

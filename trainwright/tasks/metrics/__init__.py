"""Metrics of the field, one file for each family, written from their definitions."""

"""Evaluation: protocols, features, test sets, reports, and the two commands."""

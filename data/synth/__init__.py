"""Synthetic faces: people and photographs drawn from random numbers, and test sets of them."""

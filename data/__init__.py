"""Training and test sets: commands that make, align, pack, check and decode them."""

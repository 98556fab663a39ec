"""Commands for a trained student: export, quantise, measure, compare faces."""

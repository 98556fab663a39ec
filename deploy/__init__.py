"""Commands for a trained student: export, quantise, publish, measure, compare faces."""

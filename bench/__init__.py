"""How fast and how large: this against the plain way, as ratios of one run."""

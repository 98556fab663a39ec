"""Drawn faces: a stand-in for photographs, to see the machinery work."""

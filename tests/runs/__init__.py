"""Whole runs in real processes: resumed, killed, over ranks and machines, of earlier versions."""

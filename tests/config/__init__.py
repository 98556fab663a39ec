"""The configuration: where values come from, which of them wins, how mistakes are told."""

"""Losses: one header made of class centres and a margin."""

from utils.losses.header import Header, build_header

__all__ = ["Header", "build_header"]

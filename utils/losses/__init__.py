"""Losses: one header made of class centres and a margin."""

from utils.losses.header import Header, build_header, check_options

__all__ = ["Header", "build_header", "check_options"]

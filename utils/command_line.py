"""The argument parser that all commands share."""

import argparse


def command_parser(description: str, allow_abbrev: bool = False) -> argparse.ArgumentParser:
    """A parser that shows ``description``, a module's docstring, as it stands."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )

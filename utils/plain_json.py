"""JSON that every reader takes: infinite and undefined numbers, for which JSON has no word, become
null.
"""

import json
import math


def dumps(value, **options) -> str:
    """``json.dumps`` of dicts, lists and plain values; NaN and infinities become null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value):
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

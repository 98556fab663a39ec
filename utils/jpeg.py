"""Whether a JPEG is all there: decoders fill what is missing with grey and say nothing."""

import re

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
# in coded image data 0xff stands before 0 (it is data), 0xd0 ... 0xd7 (restart) or 0xff (filling)
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_END_OF_IMAGE = 0xD9
# markers without a length behind them
_BARE = {0x01, 0xD8}


def ends_early(encoded: bytes | memoryview) -> bool:
    """Whether these bytes are a JPEG without its end marker; what follows that does not matter.

    Other formats (PNG, WebP, ...) are none of this function's business: False.
    """
    if bytes(encoded[:3]) != JPEG_START:
        return False
    # as the last two bytes it is the image's own: a thumbnail's has the image behind it
    if bytes(encoded[-2:]) == JPEG_END:
        return False
    encoded = bytes(encoded)
    at = 2
    while marker := _MARKER.search(encoded, at):
        code, at = marker[1][0], marker.end()
        if code == _END_OF_IMAGE:
            return False
        # a segment is passed over: a thumbnail in it has an end marker of its own
        if code not in _BARE:
            at += int.from_bytes(encoded[at : at + 2], "big")
    return True

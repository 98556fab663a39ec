"""The commands of data/: aligning, packing, checking, decoding and drawing faces."""

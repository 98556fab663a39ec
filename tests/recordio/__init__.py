"""RecordIO files: golden bytes, damaged ones, the real MXNet."""

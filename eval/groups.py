"""Figures by group of people (``--groups FILE``): who is recognised worse, and by how much.

What results hold under ``groups`` -> kind ("verification", "ijb", "tinyface") -> set:

    {"by_group": {group: {"genuine_pairs": n, "impostor_pairs": n, (tinyface: "probes": n)
                          k: value, k-95: [low, high], ...},    # as for the whole set
                  ...},
     "worst": {k: group},            # of the rates alone
     "common_threshold": score,      # of the whole set at FMR 1e-3; pairs only
     "fmr_ratio": 3.2}               # largest / smallest fmr_at_common_threshold, or "unresolved"

Pairs count in a group if both people are in it. Besides the set's own figures a group has
``fmr_at_common_threshold`` and ``fnmr_at_common_threshold`` (in the set's unit). A group with too
few pairs has its counts only.

Names come from the set: a person or an image (path, file name or file name without extension). A
``.bin`` file has none: a file ``<set>.names.csv`` beside ``<set>.bin``, first line
``first,second``, then a line a pair in the set's order with its two images' paths; the folder of an
image is its person.
"""

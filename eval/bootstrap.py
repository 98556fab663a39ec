"""How sure figures are: 95 % intervals from a bootstrap that draws people, not pairs.

The pairs of one person are not independent, and an impostor pair depends on two people. A draw
takes as many people as there are, with replacement; a person drawn n times gives a genuine pair
the weight n, two people an impostor pair the weight n1 * n2, and the figure is computed anew with
these weights, thresholds included. In 1:N the gallery stays, and probes are drawn by person. The
draws depend on the number of people and of draws only: two checkpoints on one set meet the same
ones, so that their figures can be subtracted draw by draw.

Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the subsets bootstrap",
CVIU 2004; Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, which shows that
the product of two people's counts never makes intervals too short on average: where most people
are in one pair only, they are too long.

What results (JSON, and the dict of ``Evaluator.evaluate_checkpoint``) hold:

* beside a figure ``k``, with ``--intervals N``, its interval ``k-95``: [low, high], in the figure's
  unit; null where a limit is infinite (a threshold above all scores);
* pair sets: ``fnmr_at_fmr_0.1`` ... ``fnmr_at_fmr_1e-06`` and ``eer`` (fractions),
  ``genuine_pairs``, ``impostor_pairs``; IJB 1:1: ``<variant>_fnmr_at_fmr_0.1`` ...,
  ``<variant>_eer`` (percent, as its TPR);
* ``groups``, with ``--groups FILE`` only: see eval/groups.py.

In the flat tables (``<name>_metrics.csv``, ``summary.csv``) an interval is two figures,
``<k>-95.low`` and ``<k>-95.high``.
"""

"""Headers: against golden figures, over ranks, with many classes."""

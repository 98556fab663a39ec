"""Tests of teacher."""

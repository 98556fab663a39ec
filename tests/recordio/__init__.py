"""Tests of recordio."""

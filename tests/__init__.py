"""The tests, in rooms as the code has. CONTRIBUTING.md says how to run them."""

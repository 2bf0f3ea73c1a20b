"""Planted mutants: each takes one protection out of the code, and a test must then fail.

`python -m tests.mutants` plants them all and prints a table; `test_mutants.py` does it in pytest.
"""

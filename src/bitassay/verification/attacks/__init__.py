"""Dishonest hosts and forged files: `attack.py` says what an attack is and how to add one."""

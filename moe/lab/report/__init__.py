"""The page of a run: its curves, its balance, its experts, a text coloured by them, and what it cost."""

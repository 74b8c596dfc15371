"""Search for settings: which to try, and what came of it. Optuna chooses."""

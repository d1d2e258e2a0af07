"""The benchmark: one PPO iteration of this project beside those of the trainers it replaces."""

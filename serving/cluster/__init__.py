"""Replicas of models on a Ray cluster (extra ray). Nothing else in `serving/` imports Ray."""

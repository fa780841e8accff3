"""Recipes: each makes a model bundle out of published weights. Start with README.md."""

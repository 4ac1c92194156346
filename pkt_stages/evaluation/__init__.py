"""Scoring models: lm-evaluation-harness with this project's task files, and a sandbox for generated code."""

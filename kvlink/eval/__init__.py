"""Measuring: questions, scores, and tables of what transfers cost and keep."""

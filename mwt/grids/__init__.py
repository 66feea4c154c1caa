"""Grids of programs: a YAML file becomes jobs, jobs become records, records a table and a leaderboard."""

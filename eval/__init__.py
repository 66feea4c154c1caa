"""Programs that evaluate and show what a run has learned."""

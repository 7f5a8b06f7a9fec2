"""Pictures of runs: what is measured for them, how it is drawn, and the report that gathers them."""

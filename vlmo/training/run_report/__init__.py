"""The report of a run, and of several beside each other."""

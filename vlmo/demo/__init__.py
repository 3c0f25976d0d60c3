"""The demo: a generated world that goes through every stage of the framework (`python -m vlmo.demo`)."""

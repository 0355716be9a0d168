"""Dataflow: pipelines of operators and worker processes over channels."""

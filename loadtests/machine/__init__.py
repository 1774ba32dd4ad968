"""The machine around a run: processes, the target, the pre-test, what the figures come from."""

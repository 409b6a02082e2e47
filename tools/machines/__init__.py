"""Makes the machines that ship: `python -m tools.machines`."""

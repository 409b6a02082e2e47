"""Devices and where weights live: backends, and experts that run on the CPU behind submit and sync."""

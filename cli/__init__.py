"""The `dsr1` command."""

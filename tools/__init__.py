"""Tools that build the project's assets; not shipped in the package."""

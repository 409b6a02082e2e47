"""nano-r1: how the small reasoning model that ships with the package is made."""

"""How each family's `config.json` is read: one module a family, one function an architecture."""

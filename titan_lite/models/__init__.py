"""The modular transformer: a feature is a class in a slot, chosen by `type` in the TOML."""

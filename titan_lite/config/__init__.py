"""Typed configuration: components chosen by `type`, TOML with inheritance, errors with file and line."""

"""The modular transformer. A feature is a class in a slot; see docs/architecture.md."""

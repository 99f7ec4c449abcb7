"""titan_lite: a PyTorch-native trainer driven by one TOML file."""

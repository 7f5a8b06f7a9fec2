"""Named configurations: one TOML file per recipe."""

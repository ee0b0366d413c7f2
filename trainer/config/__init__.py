"""The settings of a run, by section. YAML files and the command line set them, without importing torch."""

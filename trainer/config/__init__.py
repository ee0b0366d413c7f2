"""Settings of a run, and how YAML files and the command line set them. Imports no torch."""

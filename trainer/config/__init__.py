"""What can be set, and how YAML files and the command line set it. Imports no torch."""

"""What all commands share: options with their YAML files and help, the parser, exit statuses, progress.

A command declares its options as a dataclass; a wrong argument ends in one line and status 2.
"""

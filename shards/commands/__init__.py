"""What all commands share: options with their YAML files and help, the parser, exit statuses.

A command of another folder declares its options here, and never imports another command.
"""

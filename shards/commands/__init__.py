"""What all commands share: options with their YAML files and help, the parser, exit statuses."""

"""What belongs to no room above: files, folders, log, signals, seeds; one subject a file."""

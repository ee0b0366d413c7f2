"""Where bytes are kept, and how they are read and written. Every place is an fsspec URL, a `Location`."""
